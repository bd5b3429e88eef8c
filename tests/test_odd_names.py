"""Names of files that are not Unicode, hold line breaks or what terminals take for commands: shown, never obeyed."""

import io
import os
import sys

import hostile_methods
import pytest
from hostile import write

from averaging import cli

ODD = os.fsdecode(b"\xff\x1b[2J\n\r\xe2\x80\xae")  # a byte, "clear the screen", line breaks, "from right to left"
ROWS = {name: row for name, row in hostile_methods.ROWS.items() if row.kind == "ingredient"}


@pytest.fixture
def soup(tmp_path, monkeypatch):
    """Run the command with a standard output and error as strict as a terminal's; returns status and what they got."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*arguments, encoding="utf-8"):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=e) for e in ("strict", "backslashreplace"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        printed = []
        for stream in (out, err):
            stream.flush()
            printed.append(stream.buffer.getvalue().decode(encoding))
        return status, *printed

    return run


def renamed(row, root):
    """The arguments of a method with all its files under odd names."""
    hostile_methods.good(root, row)
    names = {path.name: f"{ODD}{path.name}" for path in root.iterdir() if path.name != "soup.yaml"}
    for name, odd in names.items():
        (root / name).rename(root / odd)
    if (root / "soup.yaml").exists():
        # As JSON escapes them, which YAML understands; half a surrogate pair is no text there.
        plain = {name: odd.replace("\udcff", "") for name, odd in names.items()}
        for name, odd in names.items():
            (root / odd).rename(root / plain[name])
        text = (root / "soup.yaml").read_text()
        for name, odd in plain.items():
            escaped = "".join(f"\\u{ord(c):04x}" if not c.isprintable() else c for c in odd)
            text = text.replace(name, f'"{escaped}"')
        (root / "soup.yaml").write_text(text)
    return [names.get(word, word) for word in row.arguments]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_printed(tmp_path, soup, name, encoding):
    arguments = renamed(ROWS[name], tmp_path)
    suffix = "" if "--lora" in arguments or name == "a range" else ".safetensors"
    inspecting = arguments[0] == "inspect"
    for options in ([],) if inspecting else (["--dry-run"], []):
        output = [] if inspecting else ["-o", f"{ODD}out{suffix}"]
        status, out, err = soup(*arguments, *output, *options, encoding=encoding)
        assert (status, err) == (0, "")
        assert all(line.isprintable() for line in out.split("\n"))
        assert name.startswith("--recipe") or "\\udcff\\x1b[2J" in out
    if not inspecting:
        assert (tmp_path / f"{ODD}out{suffix}").exists()


def test_errors(tmp_path, soup):
    write(tmp_path / "a.safetensors")
    write(tmp_path / f"{ODD}.safetensors", b"")
    for arguments in (
        ["a.safetensors", f"{ODD}.safetensors", "-o", "out"],
        ["a.safetensors", f"{ODD}gone.safetensors", "-o", "out"],
        ["a.safetensors", "-o", f"{ODD}/out"],
        ["a.safetensors", "-o", "out", f"--{ODD}"],
        ["a.safetensors", "-o", "out", "--method", ODD],
        ["a.safetensors", "-o", "out", "--alpha", ODD],
        ["a.safetensors", "-o", "out", "--only", f"({ODD}"],
        ["--recipe", f"{ODD}.yaml"],
        ["inspect", "a.safetensors", "--init", f"{ODD}.safetensors"],
        ["inspect", f"--{ODD}"],
    ):
        for encoding in ("utf-8", "ascii"):
            status, out, err = soup(*arguments, encoding=encoding)
            assert (status, out) == (2, "")
            assert err.endswith("\n")
            assert err[:-1].isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", f"{ODD}.safetensors"}
