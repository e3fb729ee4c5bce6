"""Files on their way into a bucket as plans: what is sent, what is there, what older pages still need, what goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.domain.media import CONTENT_TYPES, UNKNOWN, content_type
from pantala.kit import ids
from pantala.planner.statics import KEPT_PUSHES, fingerprinted, plan_cleaning, plan_push
from pantala.wire.statics import FileContent, Manifest


def files(**contents: str) -> dict[str, FileContent]:
    """`index_html="a"` is `index.html` with the content `a`."""
    return {
        name.replace("__", "-").replace("_", "."): FileContent(size=len(text), sha256=text.rjust(64, "0"))
        for name, text in contents.items()
    }


def push(own: dict[str, FileContent], kept: dict[str, FileContent] | None = None) -> Manifest:
    return Manifest(url_prefix="/static", files=own, kept=kept or {})


def test_the_first_push_sends_everything() -> None:
    plan = plan_push(files(b_txt="1", a_txt="2"), {})
    assert (plan.same, plan.uploads, plan.copies, plan.kept) == (None, ["a.txt", "b.txt"], {}, {})


def test_the_same_files_again_are_the_same_push() -> None:
    own = files(a_txt="1")
    assert plan_push(own, {"01B": push(own), "01A": push(files(a_txt="2"))}).same == "01B"
    assert plan_push(own, {"01A": push(own), "01B": push(files(a_txt="2"))}).same is None, "only the newest is"


def test_what_has_not_changed_is_copied_and_what_has_is_sent() -> None:
    earlier = {"01A": push(files(a_txt="1", b_txt="1")), "01B": push(files(a_txt="1", b_txt="2", c_txt="3"))}
    plan = plan_push(files(a_txt="1", b_txt="1", c_txt="4", d_txt="5"), earlier)
    assert plan.uploads == ["c.txt", "d.txt"]
    assert plan.copies == {"a.txt": "01B", "b.txt": "01A"}


def test_pages_that_are_open_find_their_scripts_and_nothing_else_outlives_the_project() -> None:
    before = files(index_html="1", old_html="1", secret__3f2a9c1b_txt="1", app__3f2a9c1b_js="1", app_css="1")
    plan = plan_push(files(index_html="2", app__9d8e7f6a_js="2"), {"01A": push(before)})
    assert plan.uploads == ["app-9d8e7f6a.js", "index.html"]
    assert plan.kept == {"app-3f2a9c1b.js": before["app-3f2a9c1b.js"]}
    assert plan.kept_from == {"app-3f2a9c1b.js": "01A"}


def test_what_was_kept_is_not_kept_for_ever() -> None:
    old = files(app__3f2a9c1b_js="1")
    earlier = {"01A": push(old)}
    for number in range(2, 2 + KEPT_PUSHES):
        own = files(index_html=str(number))
        plan = plan_push(own, earlier)
        assert set(plan.kept) == set(old)
        earlier[f"01{chr(64 + number)}"] = push(own, plan.kept)
    assert plan_push(files(index_html="9"), earlier).kept == {}


@pytest.mark.parametrize(
    "name",
    [
        "assets/index-DiwrgTda.js", "assets/index-B3x9Zk2A.css", "main.3f2a9c1b.chunk.js", "base.55e7cbb9ba48.css",
        "chunk-ABCDEFG2.js", f"style.min.{'0a' * 32}.css", "logo-0123456789abcdef.SVG",
    ],
)  # fmt: skip
def test_names_that_hold_a_fingerprint(name: str) -> None:
    assert fingerprinted(name)


@pytest.mark.parametrize(
    "name",
    [
        "index.html", "app.js", "3f2a9c1b.js", "photo-20240131.jpg", "photo-holiday2024.jpg", "a-javascript.js", ".env",
        "jquery-3.7.1.min.js", "keys-3f2a9c1b.json", "report-3f2a9c1b.pdf", "a/3f2a9c1b-x/b.js", "main.bundled.js",
    ],
)  # fmt: skip
def test_names_that_hold_none(name: str) -> None:
    assert not fingerprinted(name)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123")),
    st.dictionaries(
        st.sampled_from(["01A", "01B", "01C", "01D"]),
        st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123")),
    ),
)
def test_each_file_comes_from_one_place_that_has_it(own: dict[str, str], before: dict[str, dict[str, str]]) -> None:
    wanted, earlier = files(**own), {name: push(files(**contents)) for name, contents in before.items()}
    plan = plan_push(wanted, earlier)
    if plan.same is not None:
        assert earlier[plan.same].files == wanted
        return
    assert sorted([*plan.uploads, *plan.copies]) == sorted(wanted)
    assert all(earlier[source].files[path] == wanted[path] for path, source in plan.copies.items())
    assert not set(plan.kept) & set(wanted)


def test_the_newest_pushes_of_each_folder_stay_and_those_that_machines_name() -> None:
    pushes = dict.fromkeys(["01A", "01B", "01C", "01D", "01E", "01F"], "/static") | {"01G": "/docs", "00X": "/docs"}
    assert plan_cleaning(pushes, used={"01B"}) == ["01A", "01C"]
    assert plan_cleaning(pushes, used=set()) == ["01A", "01B", "01C"]
    assert plan_cleaning({}, used={"01B"}) == []


def test_a_push_says_when_it_was_begun() -> None:
    assert ids.ulid_ms(ids.ulid(1_700_000_000_123)) == 1_700_000_000_123


def test_content_types_are_those_of_a_machine_s_own_file_server() -> None:
    source = (Path(__file__).parents[2] / "crates/pantala-wire/src/media.rs").read_text()
    arms = re.findall(r'^\s+((?:"\w+"(?: \| )?)+) => "([^"]+)",$', source, re.MULTILINE)
    theirs = {extension: kind for names, kind in arms for extension in re.findall(r'"(\w+)"', names)}
    assert theirs == CONTENT_TYPES
    assert content_type("a/b.HTML") == "text/html; charset=utf-8"
    assert content_type("css") == content_type("a.b/css") == content_type("a.unknown") == UNKNOWN
