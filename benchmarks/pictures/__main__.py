import sys

from benchmarks.pictures import PICTURES, draw
from benchmarks.pictures.picture import FOLDER


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"no picture is called {', '.join(unknown)}: choose from {', '.join(PICTURES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        print(draw(name))


if __name__ == "__main__":
    main(sys.argv[1:])
