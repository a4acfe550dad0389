"""Weights by name, with the hub's own client against a small server on this machine that speaks its protocol."""
import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from huggingface_hub import close_session, constants

from helpers import make_project, small_model
from test_vaes import small_kl
from models import FlowARError, load_flowar, load_vae
from models import hub
from models.vaes import find_vae
from models.weights import write_file, write_safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """files: {(repository, revision, file): bytes}; gets: paths of what was downloaded; status: of each answer."""

    def __init__(self):
        self.files, self.gets, self.status = {}, [], None

    def find(self, path):
        """(status, error code, content) of /OWNER/REPO/resolve/REVISION/FILE."""
        if self.status or "/resolve/" not in path:
            return self.status or 404, None, b""
        owner, repo, _, revision, file = path.lstrip("/").split("/", 4)
        content = self.files.get((f"{owner}/{repo}", revision, file))
        return (200, None, content) if content is not None else (404, "EntryNotFound", b"")

    def handler(hub):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self, body=False):
                status, code, content = hub.find(self.path)
                self.send_response(status)
                self.send_header("X-Repo-Commit", COMMIT)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    hub.gets += [self.path] * ("/resolve/" in self.path)
                    self.wfile.write(content)

            def do_GET(self):
                self.do_HEAD(body=True)

            def do_CONNECT(self):  # of a proxy
                self.send_error(403)
        return Handler


@pytest.fixture
def server(monkeypatch, tmp_path):
    served = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), served.handler()) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
        served.address = f"http://127.0.0.1:{http_server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", served.address)  # as HF_ENDPOINT does before the client is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        yield served
        http_server.shutdown()
    close_session()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x.pth"
    write_file(small_model().state_dict(), path)
    return path.read_bytes()


def test_a_file_is_downloaded_once(server, weights, monkeypatch):
    server.files[("me/it", "main", "deep/x.pth")] = server.files[("me/it", "v1", "x.pth")] = weights
    path = hub.local_file("hf:me/it/deep/x.pth")
    assert path.read_bytes() == weights and hub.local_file("hf:me/it/deep/x.pth") == path and len(server.gets) == 1
    assert hub.local_file("hf:me/it/x.pth@v1").read_bytes() == weights
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what is in the cache needs no network
    assert hub.local_file("hf:me/it/deep/x.pth") == path
    with pytest.raises(FlowARError, match="hf:me/it/y.pth: not in the cache, and the hub does not respond .*: download it on"):
        hub.local_file("hf:me/it/y.pth")


def test_a_proxy_that_refuses_leaves_what_is_in_the_cache(server, weights, monkeypatch, tmp_path):
    server.files[("me/it", "main", "x.pth")] = weights
    small_kl(3).save_pretrained(tmp_path / "vae")
    for file in (tmp_path / "vae").iterdir():
        server.files[("me/vae", "main", file.name)] = server.files[("me/vae", COMMIT, file.name)] = file.read_bytes()
    path, vae = hub.local_file("hf:me/it/x.pth"), find_vae("diffusers:me/vae")
    vae.open()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "https://hub.invalid/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("https_proxy", server.address)
    close_session()
    assert hub.local_file("hf:me/it/x.pth") == path and vae.open()
    with pytest.raises(Exception, match="403 Forbidden"):  # the client's own
        hub.local_file("hf:me/it/y.pth")


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_named(server, weights, monkeypatch, status):
    server.files[("me/it", "main", "x.pth")] = weights
    path, server.status = hub.local_file("hf:me/it/x.pth"), status
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert hub.local_file("hf:me/it/x.pth") == path
    with pytest.raises(FlowARError, match=f"hf:me/it/y.pth: the hub denies access .*{status}.*: check that your token .HF_TOKEN"):
        hub.local_file("hf:me/it/y.pth")


def test_a_cache_that_cannot_be_written_is_read_or_named(server, weights, monkeypatch):
    server.files[("me/it", "main", "x.pth")] = server.files[("me/it", "main", "y.pth")] = weights
    path = hub.local_file("hf:me/it/x.pth")

    def denied(name, *args, **options):
        raise PermissionError(13, "Permission denied", name)
    monkeypatch.setattr("os.makedirs", denied)
    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    assert hub.local_file("hf:me/it/x.pth") == path
    with pytest.raises(FlowARError, match="hf:me/it/y.pth: .*Permission denied.*: set HF_HOME .* to a writable folder"):
        hub.local_file("hf:me/it/y.pth")


@pytest.mark.parametrize("name", ["hf:me", "hf:me/it/x.pth@"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(FlowARError, match="expected hf:OWNER/REPO/FILE, or hf:OWNER/REPO/FILE@REVISION"):
        hub.local_file(name)
    with pytest.raises(FlowARError, match="expected one of released:flowar_small, .*released:kl16"):
        hub.local_file("released:flowar_base")


def test_released_names_are_the_authors_files(server, weights, tmp_path):
    server.files[("OliverRen/FlowAR", "main", "FlowAR-S.pth")] = weights
    with pytest.raises(FlowARError, match="tokens have 4 channels"):  # those of the file of this test
        load_flowar("released:flowar_small")
    assert server.gets == ["/OliverRen/FlowAR/resolve/main/FlowAR-S.pth"]
    server.files[("xwen99/mar-vae-kl16", "main", "kl16.ckpt")] = (make_project(tmp_path / "p", 1) / "vae.pth").read_bytes()
    assert load_vae("released:kl16").embed_dim == 4
    assert hub.release_of("hf:OliverRen/FlowAR/FlowAR-H.pth").sampling == dict(num_steps=50, cfg=2.4, guidance=0.7)
    assert hub.release_of("FlowAR-S.pth") is None


def test_adms_reference_batch_is_downloaded_once_and_whole(server, tmp_path, monkeypatch):
    name, place = "released:adm_in256", ("me/it", "main", "adm.npz")
    monkeypatch.setitem(hub.RELEASES, "adm_in256", hub.Release(f"{server.address}/me/it/resolve/main/adm.npz"))
    np.savez(tmp_path / "adm.npz", mu=1, sigma=2, mu_s=3, sigma_s=4, arr_0=np.full((2, 8, 8, 3), 77, np.uint8))
    np.savez(tmp_path / "less.npz", mu=1, sigma=2, arr_0=3)
    content, less = (tmp_path / "adm.npz").read_bytes(), (tmp_path / "less.npz").read_bytes()
    for sent, words in ((None, "HTTP Error 404"), (content[:-99], "not a zip file"), (less, "mu_s"), (content.replace(b"MMM", b"MLM"), "arr_0.npy is damaged")):
        server.files[place] = sent
        with pytest.raises(FlowARError, match=f"{name}: cannot be downloaded from http:.*{words}.*: download it elsewhere and pass its path, or copy it"):
            hub.local_file(name)
    server.files[place], server.gets = content, []
    (tmp_path / "assets" / "flowar" / "references" / "adm" / "adm.new.abc.partial").touch()  # as a kill leaves it
    with ThreadPoolExecutor(2) as pool:
        path, = set(pool.map(hub.local_file, [name] * 2))
    assert path.read_bytes() == content and len(server.gets) == 1 and {file.suffix for file in path.parent.iterdir()} == {".npz", ".lock"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.local_file(name) == path
    with pytest.raises(FlowARError, match="released:adm_in512: cannot be downloaded from https://.* .HF_HUB_OFFLINE is set.: download it elsewhere"):
        hub.local_file("released:adm_in512")


def test_our_own_safetensors_say_what_they_are(server, tmp_path):
    model = small_model()
    said = {"args": {"vae_embed_dim": 4, "vae_stride": 4}, "weights_key": "model_ema"}
    write_safetensors(model.state_dict(), said, tmp_path / hub.EXPORTED)
    server.files[("me/it", "main", hub.EXPORTED)] = (tmp_path / hub.EXPORTED).read_bytes()
    for name in (tmp_path, tmp_path / hub.EXPORTED, "hf:me/it"):
        with pytest.raises(FlowARError, match="no model in the registry has this size"):
            load_flowar(name)  # its tensors were found
    assert hub.local_file("hf:me/it").name == hub.EXPORTED
