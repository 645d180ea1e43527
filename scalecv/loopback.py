"""Whether an address is this machine's own, so that nobody else reaches what listens there."""

import ipaddress


def is_loopback(host: str | None) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1, as a person writes them.

    Nothing is resolved: a name that leads to loopback today, and an unusual spelling such as 127.1, count as elsewhere.
    """
    name = (host or "").strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
