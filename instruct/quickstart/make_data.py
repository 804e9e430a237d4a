"""Generate arithmetic word problems with a chain of thought, in OpenOrca's schema.

The number pairs of the held-out questions never occur in the training rows, in either order, so a right answer there is
arithmetic and not memory. The same seed gives the same bytes.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

SYSTEM_PROMPTS = ("", "Think step by step.")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "stones")
QUESTIONS = (
    "{name} has {a} {items} and buys {b} more. How many {items} does {name} have now?",
    "There are {a} {items} in a box. {name} adds {b}. How many {items} are in the box?",
    "{name} finds {a} {items} today and {b} the day after. How many {items} is that?",
    "{name} gets {a} {items} from a friend and {b} from another. How many {items} is that?",
)
LARGEST_SUM = 99
HELD_OUT_SHARE = 0.1

Pair = tuple[int, int]


def reason(a: int, b: int) -> str:
    """The worked answer to `a + b`: the tens of `b` first, then its ones."""
    tens, ones = b // 10 * 10, b % 10
    steps = [part for part in (tens, ones) if part]
    worked, value = [], a
    for step in steps:
        worked.append(f"{value} + {step} = {value + step}.")
        value += step
    return f"{' '.join(worked)} The answer is {value}."


def part_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """All pairs of positive numbers, the smaller first, with a sum of at most LARGEST_SUM: (training, held out)."""
    pairs = [(a, b) for a in range(1, LARGEST_SUM) for b in range(a, LARGEST_SUM - a + 1)]
    rng.shuffle(pairs)
    held_out = int(len(pairs) * HELD_OUT_SHARE)
    return pairs[held_out:], pairs[:held_out]


def problems(rng: random.Random, pairs: Sequence[Pair], rows: int, name: str) -> Iterator[dict[str, str]]:
    """`rows` word problems over `pairs`, either number first."""
    for number in range(rows):
        a, b = rng.sample(rng.choice(pairs), 2)
        question = rng.choice(QUESTIONS)
        yield {
            "id": f"cot.{name}.{number}",
            "system_prompt": rng.choice(SYSTEM_PROMPTS),
            "question": question.format(name=rng.choice(NAMES), items=rng.choice(ITEMS), a=a, b=b),
            "response": reason(a, b),
        }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="Training rows to write (.jsonl).")
    parser.add_argument("--held_out", type=Path, required=True, help="Held-out rows to write (.jsonl).")
    parser.add_argument("--train_rows", type=int, default=24_000)
    parser.add_argument("--held_out_rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    train, held_out = part_pairs(rng)
    for path, pairs, rows in (
        (options.train, train, options.train_rows),
        (options.held_out, held_out, options.held_out_rows),
    ):
        with path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in problems(rng, pairs, rows, path.stem))
        print(f"{path}: {rows} rows over {len(pairs)} number pairs")


if __name__ == "__main__":
    main()
