"""Run lm-evaluation-harness with the model `baklava`, which it would not find alone; all arguments are its own.

python jobs/harness.py run --model baklava --model_args pretrained=demo,plan=uniform:0.3 --tasks lambada_openai
python jobs/harness.py run --model baklava --model_args pretrained=demo,plan=runs/mine/plan.json --tasks gsm8k_cot
"""

import importlib.util
import sys

from baklava.console import run_cli
from baklava.errors import UserError
from baklava.runtime.cpu_threads import configure_threads


def main() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; run pip install -c constraints.txt -e '.[lm-eval]'")
    configure_threads()
    from lm_eval.__main__ import cli_evaluate

    import baklava.evaluation.lm_eval  # noqa: F401 - registers the model

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(run_cli("harness", main))
