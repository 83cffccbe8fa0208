"""These tests need lmms-eval, which has an environment of its own (`launch/setup.sh --eval`); launch/test.sh runs them
there.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("lmms_eval") else ["test_*.py"]
