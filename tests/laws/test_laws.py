import subprocess
import sys

import dynmix.laws


def test_import_is_light_and_torch_stays_out():
    code = "import sys, dynmix.laws; sys.exit(bool({'sklearn', 'scipy', 'lightgbm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import sys, numpy as np; from dynmix.laws import AutoLaw, LightGBM\n"
        "LightGBM(trees=2).fit(np.eye(4), np.eye(4)[:, :1])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist():
    for name in dynmix.laws.__all__:
        assert getattr(dynmix.laws, name).__name__ == name
