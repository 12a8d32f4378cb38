"""Fixtures of pages: a headless browser, where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.fixture
def browse(tmp_path):
    """Loads a page in a headless Chromium: its document after scripts ran, and what it wrote to the console."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium found: the page is not looked at in a browser (Debian: apt-get install chromium)")
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    quiet += "disable-component-update disable-sync enable-logging=stderr dump-dom virtual-time-budget=5000"

    def load(path):
        flags = [f"--{flag}" for flag in quiet.split()]
        command = [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return load
