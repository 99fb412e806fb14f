"""The README's Python runs as it stands, block after block, from the project's root."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_python_blocks_run(monkeypatch, capsys, hastily):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "STRICT_SADDLE" in capsys.readouterr().out


def test_set_up_is_two_commands():
    text = (ROOT / "README.md").read_text()
    targets = (ROOT / "Makefile").read_text()
    for target in ("verify", "test"):
        assert f"make {target}" in text
        assert f"\n{target}: $(READY)" in targets


def test_every_claim_is_listed():
    from ufm.lab.claims import REGISTRY

    text = (ROOT / "README.md").read_text()
    assert [c.name for c in REGISTRY if f"| {c.name} |" not in text] == []
