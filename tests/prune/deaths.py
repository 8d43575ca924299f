"""Patches for ``sppctl prune`` in a process of its own, which end it on its way."""

from __future__ import annotations

# each ends the process as kill -9 does, at the named point
DEATHS = {
    "copy": """
def half(source, target):
    target.write_bytes(source.read_bytes()[:1000])
    die()
checkpoint.shutil.copyfile = half
""",
    "first write": """
def half(self, name, tensor):
    write(self, name, tensor / 3)
    die()
write, safe_files.OwnFile.write = safe_files.OwnFile.write, half
""",
    "write of block 2": """
def half(self, name, tensor):
    write(self, name, tensor if ".2." not in name else tensor / 3)
    if ".2.mlp" in name:
        die()
write, safe_files.OwnFile.write = safe_files.OwnFile.write, half
""",
    "before publication": """
def then_die(*_):
    die()
prune._summary = then_die
""",
}
# finished blocks; the other deaths leave none
DONE = {"write of block 2": 2, "before publication": 4} | {f"block {number} done": number + 1 for number in (0, 2, 3)}
for name in ("block 0 done", "block 2 done", "block 3 done"):
    DEATHS[name] = f"""
def then_die(self, entry):
    append(self, entry)
    if len(self.blocks) == {DONE[name]}:
        die()
append, walk.Journal.append = walk.Journal.append, then_die
"""
START = """
import os, signal
from sppctl.files import safe_files
from sppctl.model import checkpoint
from sppctl.prune import stage as prune, walk
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
