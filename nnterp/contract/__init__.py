"""What is promised of every model, as questions that are put to one model and answered with yes, no or cannot.

    for verdict in run_contract("my-model"):
        verdict.promise, verdict.answer, verdict.why          # 'reads', 'ok', ''

Nothing is believed: each answer compares what the interface gives with what plain PyTorch hooks see on the same model.
"""

from nnterp.contract.promises import PROMISES
from nnterp.contract.run import Verdict, run_contract
from nnterp.contract.subject import Broken, CannotTell, Subject

__all__ = ["Broken", "CannotTell", "PROMISES", "run_contract", "Subject", "Verdict"]
