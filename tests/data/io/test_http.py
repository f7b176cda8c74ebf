import ssl
import sys

import pytest

from tests.judges.helpers import endpoint, said
from trl_vlm.data.io.http import JSONServer, retry_after_seconds


def test_a_proxy_without_a_host_is_refused(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://:8080")
    with pytest.raises(ValueError, match="the proxy before it, names no host"):
        JSONServer("http://judge.example/v1", None, timeout_seconds=5).post(b"{}")


def test_on_a_machine_without_certificates_it_is_the_connection_that_fails(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    nowhere = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setitem(sys.modules, "certifi", None)
    with endpoint(lambda body, _: said("yes")) as server, pytest.raises(OSError, match="SSL"):
        JSONServer(server.url.replace("http:", "https:"), None, timeout_seconds=5).post(b"{}")


def test_retry_after_is_seconds_or_a_date():
    assert retry_after_seconds("2.5") == 2.5
    assert retry_after_seconds(None) is None
    for value in ("soon", "nan", "inf", "-inf", "1e999", "Mon, 01 Jan 99999 00:00:00 GMT", ""):
        assert retry_after_seconds(value) is None
    assert retry_after_seconds("-1") == -1
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") < 0
