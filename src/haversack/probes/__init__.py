"""Tasks that need the far past: recall and copying probes, and exact-match scores of a model, or of a cache method, on them."""

from haversack.probes.score import (
    EncodedProbe,
    encode_probe,
    exact_match,
    score_answers,
    score_forward,
    token_counter,
    window_mask,
)
from haversack.probes.tasks import (
    HELD_OUT,
    SEEN,
    TEMPLATES,
    AnswerInPrompt,
    Probe,
    check_probe,
    make_copy,
    make_recall,
    make_statements,
)

__all__ = [
    "HELD_OUT", "SEEN", "TEMPLATES", "AnswerInPrompt", "EncodedProbe", "Probe", "check_probe", "encode_probe", "exact_match", "make_copy", "make_recall", "make_statements",
    "score_answers", "score_forward", "token_counter", "window_mask",
]  # fmt: skip
