"""Workers on two hosts, simulated by network namespaces with a link between them."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import workers as script
from test_distributed import IMPATIENT, assert_close, run_workers

SERVER = """
import sys, threading
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
server = RendezvousHTTPServer((sys.argv[1], 0), RendezvousHandler, 0)
server.init(get_host_assignments(parse_hosts("a:1,b:1"), 2))
print(server.server_port, flush=True)
server.serve_forever()
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two network namespaces that are connected by a link."""

    def __init__(self):
        self.names = [f"dwd{os.getpid()}{end}" for end in "ab"]
        self.links = [f"v{os.getpid() % 10**8}{end}" for end in "ab"]
        self.addresses = ["10.203.7.1", "10.203.7.2"]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def start(self, name, folder, **environment):
        """Start a worker on each host."""
        inside = [["ip", "netns", "exec", host] for host in self.names]
        self.server = subprocess.Popen(
            [*inside[0], sys.executable, "-c", SERVER, self.addresses[0]], stdout=subprocess.PIPE
        )
        port = int(self.server.stdout.readline())
        processes = []
        for rank, link in enumerate(self.links):
            own = {
                "HOROVOD_HOSTNAME": "ab"[rank],
                "HOROVOD_RANK": rank,
                "HOROVOD_SIZE": 2,
                "HOROVOD_LOCAL_RANK": 0,
                "HOROVOD_LOCAL_SIZE": 1,
                "HOROVOD_CROSS_RANK": rank,
                "HOROVOD_CROSS_SIZE": 2,
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": self.addresses[0],
                "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
                "HOROVOD_GLOO_IFACE": link,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "CUDA_VISIBLE_DEVICES": "-1",
            }
            variables = {key: str(value) for key, value in (own | environment).items()}
            command = [sys.executable, str(Path(script.__file__)), name, str(folder)]
            processes.append(
                subprocess.Popen(
                    [*inside[rank], *command],
                    env=os.environ | variables,
                    stderr=subprocess.DEVNULL,
                )
            )
        return processes

    def stop(self):
        self.server.kill()
        self.server.communicate()


@pytest.fixture
def hosts():
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    made = Hosts()
    try:
        made.__enter__()
    except subprocess.CalledProcessError as error:
        made.__exit__()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode()}")
    yield made
    made.__exit__()


@pytest.mark.long
def test_two_hosts_a_lost_link_and_going_on(hosts, tmp_path):
    """Training is resumed after the link was lost, and the result is that of one worker."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    kept = tmp_path / "kept"
    environment = {"CHECKPOINTS": str(kept), "SHARDED": "1"}
    workers = hosts.start("sequence", tmp_path / "two", **environment, **IMPATIENT)
    deadline = time.monotonic() + 120
    while not list(kept.glob("checkpoint-00000001.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    ip("-n", hosts.names[1], "link", "set", hosts.links[1], "down")
    lost = time.monotonic()
    codes = [worker.wait(60) for worker in workers]
    assert time.monotonic() - lost < 60
    assert all(codes)
    assert not list((tmp_path / "two").iterdir())
    hosts.stop()

    ip("-n", hosts.names[1], "link", "set", hosts.links[1], "up")
    workers = hosts.start("sequence", tmp_path / "two", **environment)
    assert [worker.wait(120) for worker in workers] == [0, 0]
    hosts.stop()
    (one,) = run_workers("sequence", tmp_path / "one", 1, CHECKPOINTS=str(tmp_path / "other"))
    for rank in range(2):
        with np.load(tmp_path / "two" / f"sequence.{rank}.npz") as found:
            assert_close(dict(found), one)
