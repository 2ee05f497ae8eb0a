"""The tasks solved from their sources, one function each, by nothing that made them."""

import re


def listed(source: str) -> list[str]:
    (inside,) = re.findall(r"\[ (.*) \]", source)
    return inside.split(", ")


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def solve_copy(source: str) -> list[str]:
    return re.fullmatch(r"(?:Copy|Reverse): (.*) \[SEP\] ", source)[1].split()


def solve_replaced(source: str) -> str:
    old, new, text = re.fullmatch(r"Replace (\S+) with (\S+) in (.*) \[SEP\] ", source).groups()
    assert set(text.split()) == {old} and old != new
    return " ".join(new for _ in text.split())


def solve_addition(source: str) -> str:
    first, second = re.fullmatch(r"Compute (.*) \+ (.*) \? ", source).groups()
    return f"The answer is {' '.join(str(number(first) + number(second)))}."


def solve_summation(source: str) -> str:
    return f"The answer is {sum(map(int, re.findall(r'[0-9]', source))) % 10} ."


def solve_parity(source: str) -> str:
    assert source.startswith("Is the number of 1's even in the sequence [ ") and source.endswith(" ] ? ")
    return f"The answer is {['Yes', 'No'][listed(source).count('1') % 2]}."


def solve_polynomial(source: str) -> str:
    x, terms = re.fullmatch(r"Evaluate at x = (.*) in (.*) \? ", source).groups()
    terms = re.sub(r"- (\d)", r"-\1", terms)  # 2 * x ** 3 + -1 * x ** 0 is Python
    return f"The answer is {eval(terms, {'x': number(x)}) % 10}."


def solve_sort(source: str) -> str:
    order = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN".index
    return f"The sorted list is [ {', '.join(sorted(listed(source), key=order))} ]."


def solve_sort_integers(source: str) -> str:
    return f"The sorted list is [ {', '.join(sorted(listed(source), key=number))} ]."


def solve_lego(source: str) -> str:
    clauses, query = re.fullmatch(r"If (.*)\. Then, what is the value of (.)\? ", source).groups()
    rules = dict(clause.split(" = ") for clause in clauses.split(", "))
    value, at = 1, query
    while rules[at] not in ("+1", "-1"):
        sign, at = rules[at].split()
        value *= {"+": 1, "-": -1}[sign]
    return f"The answer is {value * int(rules[at]):+d}."


def solve_scan(source: str) -> str:
    """By the interpretation rules of Lake and Baroni's figure 7."""

    def act(phrase: str) -> list[str]:
        for joint, turned in (" and ", 1), (" after ", -1):
            if joint in phrase:
                return [action for part in phrase.split(joint)[::turned] for action in act(part)]
        *words, last = phrase.split()
        if last in ("twice", "thrice"):
            return act(" ".join(words)) * {"twice": 2, "thrice": 3}[last]
        if last not in ("left", "right"):
            return [last.capitalize()]
        verb = [] if words[0] == "turn" else [words[0].capitalize()]
        turn = last.capitalize()
        return {"opposite": [turn, turn, *verb], "around": [turn, *verb] * 4}.get(words[-1], [turn, *verb])

    return " ".join(act(re.fullmatch(r"Solve: (.*)\[SEP\] ", source)[1]))


def solve_pcfg(source: str) -> str:
    words = re.fullmatch(r"Solve: (.*)\[SEP\] ", source)[1].split()[::-1]

    def value() -> list[str]:
        name = words.pop()
        if name in ("append", "prepend", "remove_first", "remove_second"):
            first = value()
            assert words.pop() == ","
            second = value()
            return {
                "append": first + second,
                "prepend": second + first,
                "remove_first": second,
                "remove_second": first,
            }[name]
        if name in ("copy", "reverse", "shift", "echo", "swap_first_last", "repeat"):
            x = value()
            if name == "swap_first_last":
                x = list(x)
                x[0], x[-1] = x[-1], x[0]
            return {
                "reverse": x[::-1],
                "shift": [*x[1:], x[0]],
                "echo": [*x, x[-1]],
                "repeat": [*x, *x],
            }.get(name, x)
        string = [name]
        while words and words[-1] != ",":
            string.append(words.pop())
        return string

    result = value()
    assert not words
    return " ".join(result)


SOLVERS = {
    "copy": lambda source: " ".join(solve_copy(source)),
    "copy_2x": lambda source: " ".join(solve_copy(source) * 2),
    "copy_replaced": solve_replaced,
    "copy_multi": lambda source: " ".join(solve_copy(source)),
    "copy_multi_2x": lambda source: " ".join([*solve_copy(source), "[NEXT]", *solve_copy(source)]),
    "reverse": lambda source: " ".join(solve_copy(source)[::-1]),
    "reverse_2x": lambda source: " ".join([*solve_copy(source)[::-1], "[NEXT]", *solve_copy(source)[::-1]]),
    "reverse_mcrv": lambda source: " ".join([*solve_copy(source)[::-1], "[NEXT]", *solve_copy(source)]),
    "addition": solve_addition,
    "summation": solve_summation,
    "parity": solve_parity,
    "polynomial": solve_polynomial,
    "sort": solve_sort,
    "sort_integers": solve_sort_integers,
    "lego": solve_lego,
    "scan": solve_scan,
    "pcfg": solve_pcfg,
    "passkey": lambda source: " " + re.search(r"The pass key is (\d+)\. Remember", source)[1],
}
