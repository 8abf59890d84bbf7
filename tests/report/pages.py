"""Reading a page as a browser would: its elements, its text, and whatever it could fetch."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Elements (`tags` with their attributes) and `text` outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("/" + tag)

    def handle_data(self, data: str) -> None:
        if not self.inside or self.inside[-1] not in ("script", "style"):
            self.parts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def foreign(self) -> list[str]:
        """What the page would fetch, or run, that is not its own."""
        found = [
            f"{name} {key}={value}"
            for name, attributes in self.tags
            for key, value in attributes.items()
            if (key in LOADS and not (value or "").startswith(("#", "data:"))) or key.startswith("on")
        ]
        return found + [
            name for name, _ in self.tags if name in ("img", "iframe", "object", "embed", "form", "base")
        ]
