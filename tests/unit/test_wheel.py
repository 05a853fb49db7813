"""What `pip install echelon` brings. That its client runs alone is shown in tests/e2e/test_gateway.py."""

import zipfile
from pathlib import Path

from tests.helpers.wheel import ROOT, build_wheel, packages


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """Stubs, the page, native sources: what lies in a package is needed when it runs."""
    files = {str(file.relative_to(ROOT)) for name in packages() for file in (ROOT / name).rglob("*") if file.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    held = {name for name in zipfile.ZipFile(build_wheel(tmp_path)).namelist() if ".dist-info/" not in name}
    assert held == expected
