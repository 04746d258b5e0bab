"""Typed calls of Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, overload

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

W = TypeVar("W")
P = ParamSpec("P")
T = TypeVar("T")


def handle(actor: ActorHandle[W] | type[W]) -> ActorHandle[W]:
    """Return the handle that Ray has made of a class; for type checkers Ray says that it may be the class itself."""
    return cast("ActorHandle[W]", actor)


@overload
def call(
    actor: ActorHandle[W],
    method: Callable[Concatenate[W, P], Coroutine[Any, Any, T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> ObjectRef[T]: ...


@overload
def call(
    actor: ActorHandle[W], method: Callable[Concatenate[W, P], T], *args: P.args, **kwargs: P.kwargs
) -> ObjectRef[T]: ...


def call(actor: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an actor's method and return the reference of its answer; nothing is awaited.

    `method` is that of the class (`BufferActor.claim`), so that a type checker sees its arguments and its answer. Ray's
    own `actor.claim.remote()` is not checked.
    """
    return getattr(actor, method.__name__).remote(*args, **kwargs)
