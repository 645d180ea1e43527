import pytest

from scalecv import submit
from scalecv.errors import UserError
from scalecv.loopback import is_loopback


@pytest.mark.parametrize(
    "host, here",
    [
        *[(h, True) for h in ("localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "[::1]")],
        *[(h, False) for h in ("", None, "0.0.0.0", "::", "10.0.0.1", "192.168.1.1", "169.254.169.254", "fe80::1")],
        *[
            (h, False)
            for h in ("127.0.0.1.evil.example", "localhost.evil.example", "127.1", "2130706433", "0x7f000001")
        ],
        *[(h, False) for h in ("::ffff:10.0.0.1", "0177.0.0.1", "head", "127.0.0.1:6379", " 127.0.0.1 x")],
    ],
)
def test_only_what_is_surely_this_machine_counts_as_loopback(host, here):
    assert is_loopback(host) is here


@pytest.mark.parametrize(
    "server", ["http://10.0.0.1:8265", "https://head.example", "http://127.1:8265", "http://[fe80::1]"]
)
def test_an_open_cluster_elsewhere_is_refused(server):
    with pytest.raises(UserError, match=r"runs jobs of anyone who reaches it: .*RAY_AUTH_MODE=token.*--insecure"):
        submit._check_not_open(server)


@pytest.mark.parametrize(
    "server", ["http://127.0.0.1:8265", "http://127.0.0.2:8265", "http://[::1]:8265", "http://localhost"]
)
def test_one_of_this_machine_is_not(server):
    submit._check_not_open(server)
