"""The words of the ward notes: invented people, the specialities' conditions and drugs, sentences and questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True)
class Speciality:
    """What its patients come with, and what they get (drug → usual doses)."""

    name: str
    diagnoses: tuple[str, ...]
    drugs: Mapping[str, tuple[str, ...]]


# In this order they are the main speciality of site 0, 1, … (then again from the start).
SPECIALITIES = (
    Speciality(
        name="cardiology",
        diagnoses=("angina", "hypertension", "thrombosis", "a stroke"),
        drugs={"aspirin": ("75 mg", "300 mg"), "digoxin": ("125 µg", "250 µg"), "magnesium": ("4 g", "8 g")},
    ),
    Speciality(
        name="respiratory medicine",
        diagnoses=("asthma", "pneumonia", "bronchitis", "influenza"),
        drugs={"penicillin": ("500 mg", "1 g"), "oxygen": ("2 l", "4 l"), "steroids": ("20 mg", "40 mg")},
    ),
    Speciality(
        name="rheumatology",
        diagnoses=("arthritis", "gout", "osteoporosis", "scoliosis"),
        drugs={"ibuprofen": ("200 mg", "400 mg"), "calcium": ("1 g", "2 g"), "codeine": ("30 mg", "60 mg")},
    ),
    Speciality(
        name="gastroenterology",
        diagnoses=("colitis", "hepatitis", "reflux", "pancreatitis"),
        drugs={"folate": ("1 mg", "5 mg"), "zinc": ("50 mg", "100 mg"), "antibiotics": ("2 g", "3 g")},
    ),
    Speciality(
        name="neurology",
        diagnoses=("epilepsy", "migraine", "meningitis", "dementia"),
        drugs={"lithium": ("200 mg", "400 mg"), "morphine": ("5 mg", "10 mg"), "melatonin": ("2 mg", "4 mg")},
    ),
    Speciality(
        name="endocrinology",
        diagnoses=("diabetes", "obesity", "anaemia", "jaundice"),
        drugs={"insulin": ("10 units", "20 units"), "iron": ("65 mg", "200 mg"), "sodium": ("1 g", "3 g")},
    ),
)

TITLES = ("Mr", "Mrs")
SURNAMES = {
    "train": (
        "Adams", "Ahmed", "Ali", "Baker", "Becker", "Brown", "Carter", "Chen", "Cook", "Costa", "Davis", "Evans",
        "Fischer", "Garcia", "Gray", "Hansen", "Hughes", "Jones", "Khan", "Kim", "Lee", "Lopez", "Meyer", "Moore",
        "Murphy", "Owen", "Patel", "Perry", "Reid", "Scott", "Shah", "Silva", "Smith", "Stone", "Taylor", "Walker",
        "Watson", "Wilson", "Wong", "Young",
    ),
    "val": (
        "Bell", "Clarke", "Cohen", "Ford", "Green", "Hill", "King", "Kumar", "Martin", "Morgan", "Murray", "Nelson",
        "Park", "Reed", "Ross", "Singh", "Stewart", "Turner", "Weber", "White",
    ),
}  # fmt: skip
AGES = tuple(str(age) for age in range(31, 96))
WARDS = ("Ash", "Cedar", "Holly", "Ivy", "Maple", "Oak", "Pine", "Rose", "Willow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LEVELS = ("low", "normal", "high")

# Facts that a note may leave out; `drug` brings its dose.
OPTIONAL = ("history", "drug", "stopped", "allergy", "potassium", "home")
# Fields whose values could be taken for each other.
KINDS = (("diagnosis", "history"), ("drug", "stopped", "allergy"))

# One style for each site: field → ways to say it. A note is made of those of its facts.
STYLES: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {
        "name": (
            "{name}, {age}, on {ward} ward, has {diagnosis}.",
            "{name} is {age}, lies on {ward} ward and has {diagnosis}.",
        ),
        "history": ("{name} once had {history}.", "{name} has a history of {history}."),
        "drug": ("{name} takes {drug}, {dose}.", "{name} is treated with {drug}, {dose}."),
        "stopped": ("{name} no longer takes {stopped}.", "{name} stopped {stopped}."),
        "allergy": ("{name} is allergic to {allergy}.", "{name} has an allergy to {allergy}."),
        "potassium": ("The potassium is {potassium}.", "The potassium was {potassium}."),
        "home": ("{name} goes home on {home}.", "{name} can leave on {home}."),
    },
    {
        "name": (
            "{ward} ward: {name} ({age}) has {diagnosis}.",
            "{name} ({age}, {ward} ward) is in hospital for {diagnosis}.",
        ),
        "history": ("Once had {history}.", "Has a history of {history}."),
        "drug": ("Takes {drug} ({dose}).", "Now treated with {drug} ({dose})."),
        "stopped": ("No longer takes {stopped}.", "Stopped {stopped}."),
        "allergy": ("Allergic to {allergy}.", "Has an allergy to {allergy}."),
        "potassium": ("Potassium is {potassium}.", "Potassium was {potassium}."),
        "home": ("Goes home on {home}.", "Can leave on {home}."),
    },
    {
        "name": (
            "We saw {name}, aged {age}, on {ward} ward, who has {diagnosis}.",
            "Your patient {name} ({age}) is on {ward} ward for {diagnosis}.",
        ),
        "history": ("You wrote of {history} in the past.", "There is a history of {history}."),
        "drug": ("We started {drug}, {dose}.", "We treat with {drug}, {dose}."),
        "stopped": ("We stopped {stopped}.", "Please give no more {stopped}."),
        "allergy": ("Note the allergy to {allergy}.", "The patient is allergic to {allergy}."),
        "potassium": ("The potassium came back {potassium}.", "We found the potassium {potassium}."),
        "home": ("We plan discharge on {home}.", "The discharge is on {home}."),
    },
)

# Field → questions, without the question mark, as BoolQ writes them. The value comes last.
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "diagnosis": ("does {name} have {value}", "is {name} in hospital for {value}"),
    "history": ("did {name} once have {value}", "does {name} have a history of {value}"),
    "drug": ("does {name} take {value}", "is {name} treated with {value}"),
    "stopped": ("did {name} stop {value}",),
    "allergy": ("is {name} allergic to {value}", "does {name} have an allergy to {value}"),
    "home": ("does {name} go home on {value}", "can {name} leave on {value}"),
}
