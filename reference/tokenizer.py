"""Train the tokenizer both models share, and turn the training text into token arrays.

    python -m reference.tokenizer [--new]

The shipped tokenizer is kept where there is one, for the shipped weights know no other; `--new` trains one from the text at hand.

Byte-level BPE of 4,096 entries, digits one by one: the best width for a model of this size (2,048 entries give 2.84 bytes per token on foreign
prose, 4,096 give 3.3, 8,192 give 3.7 but double the embedding).
"""

import argparse

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reference.paths import SHIPPED, scratch

VOCAB_SIZE = 4096
BOUNDARY = "<|endoftext|>"  # id 0: begins a row of training text, ends a document, pads
TRAINING_BYTES = 16_000_000  # of prose and of code each; more changes the merges little


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts, in the transformers wrapping that is shipped."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Token ids (uint16) of documents split by zero bytes, each begun by the boundary token."""
    pieces = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(text.split("\0")):
        pieces.append(np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16))
    return np.concatenate(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", action="store_true", help="train a tokenizer, and replace the shipped one")
    arguments = parser.parse_args()
    texts = {kind: (scratch() / f"train-{kind}.txt").read_text(encoding="ascii") for kind in ("prose", "code")}
    if arguments.new or not (SHIPPED / "reference-a" / "tokenizer.json").exists():
        tokenizer = train([document for text in texts.values() for document in text[:TRAINING_BYTES].split("\0")])
        for name in ("a", "b"):
            tokenizer.save_pretrained(SHIPPED / f"reference-{name}")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "reference-a")
    for kind, text in texts.items():
        tokens = encode_documents(tokenizer, text)
        np.save(scratch() / f"train-{kind}.npy", tokens)
        print(f"{kind}: {len(text)} bytes, {len(tokens)} tokens, {len(text) / len(tokens):.2f} bytes per token")


if __name__ == "__main__":
    main()
