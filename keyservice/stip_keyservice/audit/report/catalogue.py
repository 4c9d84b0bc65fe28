"""What is known of each attack and of the controls against it, and what no audit can promise.

Names, sources, assumptions and costs come from the attacks themselves. What controls close is the threat catalogue's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stip_keyservice.audit.attacks import MODULES, Attack, attack


@dataclass(frozen=True)
class Control:
    """Something that closes attacks, and what it leaves open."""

    name: str
    closes: Mapping[str, str]
    """Letter: what of that attack is closed; "" for all of it."""
    leaves: str


def _all(letters: str) -> dict[str, str]:
    return dict.fromkeys(letters, "")


CONTROLS = (
    Control(
        "A dense key in place of a permutation (hardened, throughput)",
        _all("B"),
        "Lengths of rows and all their inner products (C), alignment (D), linking (E).",
    ),
    Control(
        "An embedding table that only the enclave has: truly private, the head neither tied nor exported, no user who "
        "helps the operator",
        {"A": "comparing with the true table's rows", "B": "", "C": ""},
        "Which rows are equal, and attention maps; alignment (D) if the model derives from public weights. One user "
        "who helps can write the table down by asking for every token.",
    ),
    Control(
        "Head, final norm and sampling in the enclave, ids alone to the user (hardened)",
        {"G": "recovery of the vocabulary key", "N": "at the server: an enclave still has both tables"},
        "Distillation: a copy learned from answers.",
    ),
    Control(
        "The first blocks in the enclave, too (reserved, not offered)",
        {"I": "equal rows before the first layer", "L": "a dictionary of single tokens"},
        "Equal beginnings of sessions, and a user who asks about a hundred times a token: rate limits raise the price.",
    ),
    Control(
        "An instance of one's own (dedicated)",
        dict.fromkeys("KLM", "by users of the instance: there are no others"),
        "Linking with other instances (E), and whatever that one user does.",
    ),
    Control(
        "A model that derives from no public weights",
        _all("DF"),
        "Linking with other instances (E).",
    ),
    Control(
        "Rotation, several instances",
        {},
        "Rows of two epochs cannot be compared as they are, but linking (E) joins the epochs offline.",
    ),
    Control(
        "Budgets and rate limits",
        {},
        "They raise the price of G, J, L and M and close none of them.",
    ),
    Control(
        "Tokenizing in the client, table rows in secret order, a scan of constant access in place of a lookup",
        _all("O"),
        "Which lookups are equal.",
    ),
    Control(
        "A confidential GPU (not part of this product)",
        _all("ABCDEFGHIKLM"),
        "Its side channels, and copies learned from answers (J).",
    ),
)

LIMITS = (
    "No cryptographic guarantee and no indistinguishability is claimed. A figure says what these attacks did, not what "
    "the best attack could do.",
    "What users say is private only while the operator does not know the embedding table and no user of the instance "
    "helps it. The developer can decrypt any traffic that it obtains.",
    "Where a model derives from public weights, take weights and prompts to be recoverable offline.",
    "An operator together with one user can steal what the model does. Controls raise the price; they do not prevent "
    "it.",
    "Rotation and separate instances are hygiene, not isolation.",
    "The operator is assumed to compute what it is given. Nothing here holds against one that does not, unless "
    "integrity is checked.",
    "By design the operator goes on seeing lengths of rows and all their inner products, attention probabilities, "
    "which tokens are equal before the first layer and which beginnings are equal everywhere, lengths and timing of "
    "sessions, to which experts rows go, and invariants of the weights.",
    "Everything rests on the enclave: fresh attestation, no rollback, no side channels, custody of the hardware. A "
    "simulated enclave protects nothing.",
)
"""What holds whatever the figures say."""


def known(letter: str) -> Attack | None:
    """The attack of a letter; None where this version has none of that letter."""
    return attack(letter) if letter in MODULES else None


def name(letter: str) -> str:
    """Its name, with a capital."""
    found = known(letter)
    return found.name[:1].upper() + found.name[1:] if found else "Unknown to this version"
