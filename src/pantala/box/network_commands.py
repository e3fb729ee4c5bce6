"""`pantala box cut|heal|distances`: the network between a box's regions, looked at and disturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from pantala.box import network
from pantala.box.distances import matrix, rtt_ms
from pantala.box.layout import Box
from pantala.box.router import Cuts, regions_of
from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import json_option

FindBox = Callable[[Path | None], Box]


def add_network_commands(group: click.Group, find_box: FindBox) -> None:
    """`find_box` raises when no box runs."""
    state_option = click.option("--state", type=click.Path(path_type=Path), default=None, metavar="DIR")

    @group.command()
    @click.argument("name", metavar="REGION|NODE")
    @state_option
    @json_option
    def cut(*, name: str, state: Path | None, as_json: bool) -> None:
        """Cut a region off from the others, or a node off from everyone."""
        _tell(network.cut(find_box(state), name), as_json=as_json)

    @group.command()
    @click.argument("names", nargs=-1, metavar="[REGION|NODE...]")
    @state_option
    @json_option
    def heal(*, names: tuple[str, ...], state: Path | None, as_json: bool) -> None:
        """Take cuts back: those named, or all of them and the loss of packets."""
        _tell(network.heal_cuts(find_box(state), names), as_json=as_json)

    @group.command()
    @click.option("--loss", type=click.FloatRange(0, 90), default=None, metavar="PERCENT",
                  help="Lose so many of the packets between regions from now on.")  # fmt: skip
    @state_option
    @json_option
    def distances(*, loss: float | None, state: Path | None, as_json: bool) -> None:
        """Round trips between regions in milliseconds."""
        box = find_box(state)
        if loss is not None:
            network.set_loss(box, loss / 100)
        regions, cuts = regions_of(box), network.read_cuts(box)
        if as_json:
            pairs = {a: {b: rtt_ms(a, b) for b in regions} for a in regions}
            emit_json({"rtt_ms": pairs, "applied": box.distances, "loss": cuts.loss, "cut_off": _cut_off(cuts)})
            return
        rows = [(region, *(f"{ms:g}" for ms in line)) for region, line in zip(regions, matrix(regions), strict=True)]
        emit_table(("MS", *regions), rows, empty="")
        if not box.distances:
            say("These hold in a box made with `pantala up --distances`; in this one regions are next door.")
        _tell(cuts)


def _tell(cuts: Cuts, *, as_json: bool = False) -> None:
    cut_off = _cut_off(cuts)
    say(f"==> Cut off: {', '.join(cut_off)}" if cut_off else "==> Nothing is cut off")
    if cuts.loss:
        say(f"==> {cuts.loss:.1%} of the packets between regions are lost")
    if as_json:
        emit_json({"cut_off": cut_off, "loss": cuts.loss})


def _cut_off(cuts: Cuts) -> list[str]:
    return sorted(cuts.regions | cuts.nodes)
