"""How long the audit takes: `python tests/benchmarks/audit.py [--rows 100000]`.

Made-up rows of 36 words (20 of a question, 10 of an answer, and a shared instruction) in smollm2's tokens, and a fiftieth of them as
evaluation rows. Prints seconds of this process's own CPU time for each part, and the memory that it takes beyond the rows.
"""

from __future__ import annotations

import argparse
import random
import resource
import time

from ftx import models
from ftx.audit import audit_tokens, overlap
from ftx.data import format_batches, to_dataset
from ftx.encode import Encoded, encode_rows
from ftx.testing import make_run
from ftx_audit import Audit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("ba", "de", "gi", "ko", "lu", "man", "nor", "ras", "set", "til")]

    def rows(number: int):
        for line in range(1, number + 1):
            question, answer = " ".join(rng.choices(words, k=20)), " ".join(rng.choices(words, k=10))
            turns = [{"role": "user", "content": f"Tell me what you know of\n{question}"}, {"role": "assistant", "content": answer}]
            yield {"messages": turns, "_file": "made-up.jsonl", "_line": line}

    train, evaluation = to_dataset(rows(count)), to_dataset(rows(count // 50))
    tokenizer, run = models.load_tokenizer(models.resolve("smollm2", print)), make_run()

    def encode(some):
        return [vars(one) if isinstance(one, Encoded) else one for one in encode_rows(some, tokenizer)]

    def timed(what, work):
        begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = work()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{what}: {time.process_time() - begun:.1f} s, {grown:.0f} MiB more at the most")
        return result

    tokens = timed(f"encoding {count:,} rows (for comparison)", lambda: format_batches(train, encode, run))
    timed("core: tokens", lambda: audit_tokens(tokens, tokenizer, run))
    timed("core: equal rows", lambda: overlap(train, evaluation))
    timed("observer: training rows", lambda: Audit().audit_dataset(rows=train, train_rows=None, split="train", run=run))
    timed(f"observer: {len(evaluation):,} evaluation rows", lambda: Audit().audit_dataset(rows=evaluation, train_rows=train, split="eval", run=run))


if __name__ == "__main__":
    main()
