"""What each verb's options are and how its result is shown, a file a verb. The work itself is in `strop.recipes`."""

from __future__ import annotations

from strop.app.verbs.bench import bench
from strop.app.verbs.chat import chat, predict
from strop.app.verbs.common import stop
from strop.app.verbs.compare import compare
from strop.app.verbs.demo import demo
from strop.app.verbs.doctor import doctor
from strop.app.verbs.explain import affine, bits, tensor
from strop.app.verbs.export import export
from strop.app.verbs.patch import apply, diff
from strop.app.verbs.plan import plan
from strop.app.verbs.prove import prove
from strop.app.verbs.quantize import quantize
from strop.app.verbs.selftest import selftest
from strop.app.verbs.serve import serve
from strop.app.verbs.tune import merge, tune
from strop.app.verbs.verify import verify

__all__ = [
    "affine",
    "apply",
    "bench",
    "bits",
    "chat",
    "compare",
    "demo",
    "diff",
    "doctor",
    "export",
    "merge",
    "plan",
    "predict",
    "prove",
    "quantize",
    "selftest",
    "serve",
    "stop",
    "tensor",
    "tune",
    "verify",
]
