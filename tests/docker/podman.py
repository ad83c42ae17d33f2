"""Podman with its images, containers and settings in one folder, apart from those of the user.

Knows nothing of the project. It has been run as root alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

STORAGE = """[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
# Limits: in a container itself, root may be unable to raise its own, which Podman's defaults do.
# cgroupfs and a file of events: without systemd there is nothing else.
SETTINGS = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/tmp"
{runtime}
[network]
network_config_dir = "{folder}/networks"
"""
PACKAGES = ("python3", "python3-venv", "python3-pip", "ca-certificates")
"""What a base image of Debian's packages holds beside the least there is."""
SUITE = "bookworm"


class Podman:
    """Where its commands fail, they raise subprocess.CalledProcessError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for part in ("tmp", "networks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        runtime = 'runtime = "runc"' if shutil.which("runc") else ""  # crun: no hybrid cgroups
        storage, settings = folder / "storage.conf", folder / "containers.conf"
        storage.write_text(STORAGE.format(folder=folder))
        settings.write_text(SETTINGS.format(folder=folder, runtime=runtime))
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(settings),
            "TMPDIR": str(folder / "tmp"),
        }

    def run(
        self, *arguments: str, given: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """given: its standard input. -> with its output, errors among it only where they end it."""
        done = subprocess.run(
            ["podman", *arguments],
            env=self._environment,
            input=given,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            print(f"podman {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
            done.check_returncode()
        return done

    def watch(self, *arguments: str) -> None:
        """Run what takes minutes, with its output in sight."""
        subprocess.run(["podman", *arguments], env=self._environment, check=True)

    def make_base(self, name: str) -> None:
        """An image of Debian's packages, by debootstrap. Root only; a minute."""
        root = self._folder / "rootfs"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        subprocess.run([*command, SUITE, str(root)], check=True)
        leave = ["--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*"]
        packed = self._folder / "base.tar"
        subprocess.run(["tar", "-C", str(root), *leave, "-cf", str(packed), "."], check=True)
        shutil.rmtree(root)
        self.run("import", "--quiet", str(packed), name)
        packed.unlink()

    def remove_everything(self) -> None:
        """Containers, images and the folder."""
        self.run("rm", "--all", "--force", "--volumes", check=False)
        self.run("rmi", "--all", "--force", check=False)
        mounted = self._folder / "images/overlay"
        if os.path.ismount(mounted):
            subprocess.run(["umount", str(mounted)], check=True)
        # Without root, the files are those of the users inside, as whom alone they can be removed.
        as_them = [] if os.geteuid() == 0 else ["podman", "unshare"]
        command = [*as_them, "rm", "-rf", str(self._folder)]
        subprocess.run(command, env=self._environment, check=True)
