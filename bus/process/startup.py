"""What every role does before its first real command: is the server fit, and is its data laid out as we were told?"""

import logging

from bus.layout import LayoutMismatch, check_layout
from bus.link import AddressError, LinkDown, ServerAddress, ServerUnfit, check_server, find_warning
from bus.process.exits import StartError
from bus.settings import Settings

log = logging.getLogger(__name__)


async def prepare_server(settings: Settings) -> ServerAddress:
    """The server's address, checked. Raises StartError with one line that says what to do.

    A server that cannot be reached right now is a LinkDown, not a StartError: the role's parent tries again.
    """
    try:
        address = ServerAddress.parse(settings.redis_url)
    except AddressError as error:
        raise StartError(str(error)) from error
    if warning := find_warning(address):
        log.warning("server is not protected", extra={"why": warning})
    try:
        await check_server(address, timeout_s=settings.connect_timeout_ms / 1000)
        await check_layout(address, settings.cells)
    except ServerUnfit as error:
        if isinstance(error.__cause__, LinkDown):
            raise error.__cause__ from error
        raise StartError(str(error)) from error
    except LayoutMismatch as error:
        raise StartError(str(error)) from error
    return address
