"""A google.colab of ours, which behaves as the real one was seen to; its Drive is a folder that outlives a
mount.
"""

import sys
from pathlib import Path
from types import ModuleType


class MessageError(Exception):
    """The real one is google.colab._message.MessageError."""


ANSWERS = {  # what the user may do when Drive asks, and what mount() then raises
    "declined": MessageError("Error: credential propagation was unsuccessful"),
    "no answer for 120 s": ValueError("mount failed"),
    "forbidden": ValueError(
        "The domain policy has disabled Drive File Stream: https://support.google.com/a/answer/7496409"
    ),
}


class FakeColab:
    """`answer` is a key of ANSWERS or "yes", `picked` what is chosen for an upload, `flush_seconds` what
    the last writes take.
    """

    def __init__(self, folder, monkeypatch):
        self.mount_point, self.cloud = folder / "mount", folder / "cloud"
        self.cloud.mkdir(parents=True)
        self.answer, self.asked, self.flush_seconds = "yes", 0, 1
        self.picked, self.sent = {}, []
        drive, files = ModuleType("google.colab.drive"), ModuleType("google.colab.files")
        drive.mount, drive.flush_and_unmount = self.mount, self.flush_and_unmount
        files.upload, files.download = self.upload, self.download
        package = ModuleType("google.colab")
        package.drive, package.files = drive, files
        for module in (package, drive, files):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    @property
    def drive(self):
        """Where the user's files are while Drive is mounted."""
        return self.mount_point / "MyDrive"

    def mount(self, mountpoint, force_remount=False, timeout_ms=120_000, readonly=False):
        assert mountpoint == str(self.mount_point)
        self.asked += 1  # even where it is mounted already
        if self.answer != "yes":
            raise ANSWERS[self.answer]
        if self.drive.is_symlink() and not force_remount:
            print(
                f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call "
                f'drive.mount("{mountpoint}", True).'
            )
            return
        if self.mount_point.is_symlink():
            raise ValueError("Mountpoint must not be a symlink")
        if self.mount_point.is_dir() and any(self.mount_point.iterdir()):
            raise ValueError("Mountpoint must not already contain files")
        self.mount_point.mkdir(exist_ok=True)
        self.drive.symlink_to(self.cloud, target_is_directory=True)
        print(f"Mounted at {mountpoint}")

    def lose_mount(self):
        self.drive.unlink()

    def flush_and_unmount(self, timeout_ms=24 * 60 * 60 * 1000):
        if not self.drive.is_symlink():
            print("Drive not mounted, so nothing to flush and unmount.")
            return
        if self.flush_seconds * 1000 > timeout_ms:
            raise ValueError("flush_and_unmount failed")
        self.drive.unlink()

    def upload(self):
        """Save the picked files in the working folder, beside older ones of the same name, and return
        {name: bytes}.
        """
        for name, content in self.picked.items():
            path = Path(name)
            while path.exists():
                path = path.with_name(f"{path.stem} (1){path.suffix}")
            path.write_bytes(content)
        return dict(self.picked)

    def download(self, filename):
        if not Path(filename).exists():
            raise FileNotFoundError(f"Cannot find file: {filename}")
        self.sent.append(filename)
