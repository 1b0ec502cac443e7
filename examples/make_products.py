"""Write examples/data/products-{train,test}.jsonl: offers in one sentence, and their name and price as JSON.

    python examples/make_products.py [DIRECTORY]

The same seed gives the same bytes. No product stands in both files, and no 13 words in a row of
a question do. Most offers hold other numbers (a quantity, a
rating, a date, an old price, a shipping fee), often before the price, so that copying the first number is no answer.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

SEED = 20250
TRAIN, TEST = 500, 100
INSTRUCTION = "Give the name and the price as JSON."

KINDS = """Amber Ash Atlas Aurora Autumn Birch Brass Cedar Coastal Copper Cotton Crystal Delta Ember Falcon Garden Golden
Granite Hazel Heritage Indigo Ivory Linen Lunar Maple Marble Meadow Nordic Nova Oak Ocean Olive Orchid Orion Pearl Phoenix
Polar Prairie Royal Sahara Sierra Silver Solar Summit Titan Urban Vega Velvet Walnut Willow Winter Zephyr""".split()
THINGS = """Alarm Clock, Apron, Armchair, Backpack, Basket, Bench, Blanket, Blender, Bookshelf, Bottle, Bowl, Camera, Candle,
Chair, Coffee Grinder, Cup, Desk, Desk Lamp, Doormat, Drill, Fan, Guitar, Hammock, Headphones, Helmet, Jacket, Kettle,
Keyboard, Knife, Lantern, Mirror, Monitor, Mug, Notebook, Office Chair, Pan, Pillow, Plant Pot, Printer, Projector, Radio,
Rice Cooker, Rug, Scarf, Shelf, Speaker, Stool, Suitcase, Table, Teapot, Tent, Toaster, Towel, Tray, Umbrella, Vase,
Wall Clock, Wallet, Watch, Water Bottle"""

# Each way to write a price, and the code that the answer gives.
PRICES = [
    ("€{}", "EUR"),
    ("{} EUR", "EUR"),
    ("EUR {}", "EUR"),
    ("${}", "USD"),
    ("{} USD", "USD"),
    ("£{}", "GBP"),
    ("{} GBP", "GBP"),
    ("CHF {}", "CHF"),
]

# {price} is what the product costs now; {old} and {fee} are prices too, written in the same currency.
TEMPLATES = [
    "{name}, {price}.",
    "The {name} costs {price}, {count} left in stock.",
    "Only {count} left: {name} for {price}.",
    "{name}, rated {stars} by {count} buyers, now {price}.",
    "{name}: was {old}, now {price}.",
    "Save {percent}% on the {name}, today only {price}.",
    "Item {code}: {name} at {price}.",
    "{price} buys you the {name}, with {years} years of warranty.",
    "Ordered on {month} {day}: one {name}, {price}, paid in full.",
    "Reduced from {old}: the {name} at {price}.",
    "{count} people are looking at the {name}. Price: {price}.",
    "{name} (model {code}) for {price}, delivery in {day} days.",
    "{name} for {price} plus {fee} shipping.",
    "Shipping is {fee}, the {name} itself is {price}.",
    "Instead of {old} you pay {price} for the {name}.",
    "Since {year} our best seller: {name}, {price}.",
    "No. {count} in our list: the {name}. It sells for {price}.",
    "With {years} years of warranty, the {name} is yours for {price}.",
    "Order {code} holds one {name}; total {price}.",
    "{stars} stars from {count} buyers: the {name}, {price}, {percent}% off.",
    "From {month} {day} on, the {name} costs {price} and no longer {old}.",
    "Weighs {weight} kg, ships in {day} days: {name}, {price}.",
    "New in: {name}, {weight} kg, at {price}.",
]
MONTHS = "January February March April May June July August September October November December".split()


def offer(name: str, draw: random.Random) -> dict[str, str]:
    """One row for a product: a template filled at random, and the one right answer."""
    amount, currency = _amount(draw, 5, 400), draw.choice(PRICES)
    text = draw.choice(TEMPLATES).format(
        name=name,
        price=currency[0].format(amount),
        old=currency[0].format(_amount(draw, 401, 900)),
        fee=currency[0].format(_amount(draw, 2, 4)),
        count=draw.randint(2, 98),
        stars=f"{draw.randint(3, 4)}.{draw.randint(1, 9)}",
        percent=draw.randrange(5, 75, 5),
        code=f"{draw.choice('ABCDEFGHKLMNPRTX')}{draw.randint(10, 99)}",
        years=draw.randint(2, 6),
        month=draw.choice(MONTHS),
        day=draw.randint(2, 28),
        year=draw.randint(2012, 2024),
        weight=f"{draw.randint(1, 9)}.{draw.randint(1, 9)}",
    )
    answer = json.dumps({"name": name, "price": f"{amount} {currency[1]}"})
    return {"instruction": INSTRUCTION, "input": text, "output": answer}


def _amount(draw: random.Random, low: int, high: int) -> str:
    return f"{draw.randint(low, high)}{draw.choice(['', '.50', '.90', '.95', '.99'])}"


def make() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training rows and the test rows: every product once."""
    things = [" ".join(thing.split()) for thing in THINGS.split(",")]
    names = [f"{kind} {thing}" for kind in KINDS for thing in things]
    draw = random.Random(SEED)
    names = draw.sample(names, TRAIN + TEST)
    train = [offer(name, draw) for name in names[:TRAIN]]
    known = set().union(*map(runs_of_words, train))
    return train, [_unlike(known, name, draw) for name in names[TRAIN:]]


def runs_of_words(row: dict[str, str], length: int = 13) -> set[tuple[str, ...]]:
    """All runs of 13 words in a row's question: the usual measure of a test question that stands in the training data."""
    words = re.findall(r"\w+", f"{row['instruction']} {row['input']}".lower())
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def _unlike(known: set[tuple[str, ...]], name: str, draw: random.Random) -> dict[str, str]:
    while runs_of_words(row := offer(name, draw)) & known:
        pass
    return row


def main(directory: Path) -> None:
    """Write both files into `directory`."""
    for split, rows in zip(("train", "test"), make(), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"products-{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "data")
