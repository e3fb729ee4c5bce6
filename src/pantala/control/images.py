"""Image references: what a config names becomes a digest, and who may pull it.

Repositories of our registry are app names, so reading an image is reading its app.
"""

from __future__ import annotations

import msgspec

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.ports import Registry
from pantala.control.registry_tokens import RegistryTokens
from pantala.domain import containers
from pantala.errors import InvalidRequest, NotFound, TransientError
from pantala.images.bootstrap import RECIPES
from pantala.images.reference import DOCKER_HUB, parse
from pantala.kit.secret import Secret
from pantala.wire.machine import ImageRef, Machine, MachineConfig, OtherImage

FIELD = "config.image"
BASES = tuple(recipe.repository for recipe in RECIPES)
"""Repositories that anyone's build may read: the bases made where no registry is in reach."""


class ResolvedImages(msgspec.Struct, frozen=True, kw_only=True):
    """Each with the token with which a host may pull it."""

    main: ImageRef
    pull_token: str
    others: dict[str, OtherImage]


def _field_of(image: str, config: MachineConfig) -> str:
    """Where a config names it first."""
    for place, things in (("containers", config.containers or []), ("volumes", config.volumes or [])):
        for index, thing in enumerate(things):
            if thing.image == image:
                return f"config.{place}[{index}].image"
    return FIELD


class Images:
    def __init__(self, context: Context, access: Access, registry: Registry, tokens: RegistryTokens) -> None:
        self._context = context
        self._access = access
        self._registry = registry
        self._tokens = tokens

    async def resolve_all(self, principal: Principal, config: MachineConfig) -> ResolvedImages:
        """The machine's image, and those of its containers and volumes by the config's names."""
        field = FIELD if config.image or not config.containers else "config.containers[0].image"
        main, pull_token = await self.resolve(principal, containers.main_image(config), field)
        others: dict[str, OtherImage] = {}
        for name in containers.other_images(config):
            image, token = await self.resolve(principal, name, _field_of(name, config))
            others[name] = OtherImage(image=image, pull_token=token)
        return ResolvedImages(main=main, pull_token=pull_token, others=others)

    async def resolve(self, principal: Principal, image: str, field: str = FIELD) -> tuple[ImageRef, str]:
        """The image with its digest, and the token with which a host may pull it. Errors name `field`."""
        token = ""
        if repository := self.own_repository(image):
            if repository not in BASES:
                try:
                    await self._access.app(principal, repository, Action.READ)
                except NotFound as error:
                    raise InvalidRequest(f"image not found: {image}", field=field) from error
            token = self._tokens.issue(principal.email, repository, ("pull",))
        try:
            return await self._registry.resolve(image, token=token), token
        except NotFound as error:
            raise InvalidRequest(f"image not found: {image}", field=field, hint=error.hint) from error
        except InvalidRequest as error:
            raise InvalidRequest(error.message, field=field, hint=error.hint) from error
        except TransientError as error:
            if base := self._base_instead(image):
                return await self.resolve(principal, base, field)
            raise TransientError(
                f"{field}: {error.message}",
                hint=f"the platform's own images begin with {self._context.settings.registry}/",
                retry_after_s=error.retry_after_s,
            ) from error

    def pull_token(self, image: ImageRef) -> str:
        """For a host that takes over a machine: what the machine runs was allowed when it was created."""
        if image.registry != self._context.settings.registry:
            return ""
        return self._tokens.issue("platform", image.repository, ("pull",))

    def other_images(self, machine: Machine) -> dict[str, OtherImage]:
        """Likewise for its containers and volumes."""
        known = machine.other_images or {}
        return {name: OtherImage(image=image, pull_token=self.pull_token(image)) for name, image in known.items()}

    def _base_instead(self, image: str) -> str | None:
        """Where a registry is not in reach: the same base as made from Debian packages, in our own registry."""
        reference = parse(image)
        if reference.registry != DOCKER_HUB or reference.repository not in BASES or reference.digest:
            return None
        return f"{self._context.settings.registry}/{reference.repository}:{reference.tag}"

    def own_repository(self, image: str) -> str | None:
        """The app of an image of our registry; None for any other image."""
        name, _, rest = image.partition("/")
        if name != self._context.settings.registry or not rest:
            return None
        return rest.partition("@")[0].partition(":")[0]

    def push_token(self, app: str) -> Secret:
        """For one build of an app: it may push the app's image and read the bases that the registry holds."""
        access = [{"type": "repository", "name": app, "actions": ["pull", "push"]}]
        access += [{"type": "repository", "name": name, "actions": ["pull"]} for name in BASES]
        return Secret(self._tokens.sign(f"build of {app}", access))

    def name(self, app: str, tag: str) -> str:
        return f"{self._context.settings.registry}/{app}:{tag}"
