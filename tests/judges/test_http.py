import ssl
import sys

import pytest

from tests.judges.helpers import endpoint, said
from trl_vlm.judges.http import JSONServer


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
