"""Verification: the flags of a run go in; whether their layout trains as one device does comes out, and if not, why.

`shrink` makes a tiny run of the same layout, `yardstick` trains it plainly, `course` on the mesh, `checks` compares,
`rows` says how near is near enough, `diagnosis` names known errors, `report` lays it out, `run.verify` does all of it.
"""

from megatron.verification.run import verify
from megatron.verification.shrink import verified_flags

__all__ = ["verified_flags", "verify"]
