"""What an attached model refuses: to be copied and to be pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .session import Session


class NotCopied:
    """Base of what hangs on a user's modules: a copied hook would run the original.

    Attributes:
        session: what it belongs to.
    """

    __slots__ = ()

    session: Session

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse to be copied with the model."""
        refuse_copy(self.session)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled with the model."""
        refuse_copy(self.session)


def refuse_copy(session: Session) -> NoReturn:
    """Raise the error that names what to do."""
    raise RuntimeError(
        f"{type(session.model).__name__} has offload hooks attached and cannot be "
        "copied or pickled; call detach(model) first and attach again after, or save "
        "model.state_dict()"
    )
