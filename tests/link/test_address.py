"""REDIS_URL: what each form means, and that every mistake is told in one line."""

import pytest

from bus.link import AddressError, Endpoint, Kind, ServerAddress, find_warning


def test_a_plain_url_names_one_server_and_the_default_port() -> None:
    address = ServerAddress.parse("redis://mill.example")

    assert (address.kind, address.endpoints, address.db) == (Kind.SINGLE, (Endpoint("mill.example", 6379),), 0)
    assert (address.username, address.password, address.tls) == (None, None, None)


def test_user_password_and_database_are_read_and_percent_decoded() -> None:
    address = ServerAddress.parse("redis://mill:p%40ss%2Fword@[::1]:7000/3")

    assert (address.username, address.password, address.db) == ("mill", "p@ss/word", 3)
    assert address.endpoints == (Endpoint("::1", 7000),)


def test_a_password_alone_belongs_to_the_default_user() -> None:
    assert ServerAddress.parse("redis://:secret@h").username is None
    assert ServerAddress.parse("redis://:secret@h").password == "secret"


def test_rediss_means_tls_that_checks_the_certificate_and_the_name() -> None:
    tls = ServerAddress.parse("rediss://h:1?ssl_ca_certs=/etc/ca.pem").tls

    assert tls is not None
    assert (tls.ca_file, tls.verify, tls.check_hostname) == ("/etc/ca.pem", True, True)


def test_tls_checks_are_switched_off_only_by_name() -> None:
    tls = ServerAddress.parse("rediss://h?ssl_cert_reqs=none").tls
    assert tls is not None
    assert (tls.verify, tls.check_hostname) == (False, False)


def test_a_unix_socket_has_a_path_and_is_local() -> None:
    address = ServerAddress.parse("unix://:pw@/run/mill/s%20ock?db=2")

    assert (address.kind, address.endpoints, address.db) == (Kind.UNIX, (Endpoint("/run/mill/s ock", 0),), 2)
    assert address.is_local


def test_sentinels_are_listed_and_the_master_named() -> None:
    address = ServerAddress.parse("redis+sentinel://u:p@a:26379,b/mill/1?sentinel_password=s")

    assert address.kind is Kind.SENTINEL
    assert address.endpoints == (Endpoint("a", 26379), Endpoint("b", 26379))
    assert (address.master_name, address.db, address.sentinel_password, address.password) == ("mill", 1, "s", "p")


def test_a_cluster_is_found_through_any_of_the_nodes_named() -> None:
    address = ServerAddress.parse("rediss+cluster://a:7000,b:7001")

    assert (address.kind, address.endpoints) == (Kind.CLUSTER, (Endpoint("a", 7000), Endpoint("b", 7001)))
    assert address.tls is not None


def test_nodes_learned_later_are_asked_after_the_named_ones() -> None:
    named = ServerAddress.parse("redis+cluster://a:1,b:2")

    assert named.with_nodes([Endpoint("b", 2), Endpoint("c", 3)]).endpoints == (
        Endpoint("a", 1),
        Endpoint("b", 2),
        Endpoint("c", 3),
    )
    assert len(named.with_nodes(Endpoint("n", port) for port in range(1, 100)).endpoints) == 32


def test_valkey_may_stand_for_redis() -> None:
    assert ServerAddress.parse("valkeys://h") == ServerAddress.parse("rediss://h")
    assert ServerAddress.parse("valkey+cluster://h") == ServerAddress.parse("redis+cluster://h")


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "begin with redis://"),
        ("localhost:6379", "begin with redis://"),
        ("http://h", "not http://"),
        ("redis://", "names no host"),
        ("redis://h:99999", "no host:port"),
        ("redis://h:port", "no host:port"),
        ("redis://h/zero", "must be a number"),
        ("redis://h/0/1", "nothing is expected"),
        ("redis://a,b", "several hosts"),
        ("redis://h?retries=9", "unknown option 'retries'"),
        ("redis://h?ssl_ca_certs=/x", "write rediss://"),
        ("rediss://h?ssl_cert_reqs=maybe", "required or none"),
        ("redis+sentinel://h:1", "needs the master's name"),
        ("redis+cluster://h:1/2", "only database 0"),
        ("redis+magic://h", "begin with redis://"),
        ("unix://relative.sock", "unix:///path"),
        ("redis://:pa#ss@h", "%23"),
    ],
)
def test_a_mistake_is_told_in_one_line(url: str, hint: str) -> None:
    with pytest.raises(AddressError) as caught:
        ServerAddress.parse(url)

    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://u:hush@h/1", "redis+sentinel://u:hush@a,b/m?sentinel_password=hush"])
def test_the_printed_address_holds_no_secret(url: str) -> None:
    address = ServerAddress.parse(url)

    assert "hush" not in f"{address} {address!r}"
    assert str(address) in {"redis://h:6379/1", "redis+sentinel://a:26379,b:26379/m"}


@pytest.mark.parametrize(
    ("url", "missing"),
    [
        ("redis://10.0.0.1", "without a password and TLS"),
        ("redis://:p@mill.example", "without TLS"),
        ("rediss://mill.example", "without a password"),
        ("rediss://:p@mill.example", None),
        ("redis://127.0.0.1", None),
        ("redis://localhost", None),
        ("unix:///s", None),
    ],
)
def test_a_server_on_another_machine_without_password_or_tls_gets_a_warning(url: str, missing: str | None) -> None:
    warning = find_warning(ServerAddress.parse(url))

    assert (warning is None) if missing is None else (missing in str(warning))
