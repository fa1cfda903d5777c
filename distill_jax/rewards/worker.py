"""The process in which algebra runs: `python -m distill_jax.rewards.worker`, started by `rewards.checker`.

One JSON object a line in, `{"gold", "answer"}`; one a line out, `{"equal"}`. The CPU time of each question is limited
by a timer whose signal ends the process, so that no code, compiled or not, outlives it; the parent starts a new one.
"""

import json
import os
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space: algebra can ask for more than there is


def main() -> None:
    seconds = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints inside the libraries must not mix with the replies
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    from distill_jax.rewards.check import math_equal

    math_equal("\\frac{1}{2}", "\\frac{2}{4}")  # imports and grammar tables are not on any question's time
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            equal = math_equal(question["gold"], question["answer"])
        except MemoryError:
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": equal}), file=replies, flush=True)


if __name__ == "__main__":
    main()
