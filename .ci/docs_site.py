"""What the documentation site needs beside its pages; mkdocs.yml names this file.

Signatures spell out their options, links between notebooks and pages lead to pages, and
a built site with a dead link, or whose search lacks a term, is an error.
"""

import html.parser
import importlib
import inspect
import json
import re
from pathlib import Path
from urllib.parse import unquote, urljoin

import griffe
from mkdocs.exceptions import PluginError

TERMS = ("precondition_frequency", "memory", "pjit", "muon")


class Options(griffe.Extension):
    """Spells out `**options` in signatures, with the defaults of the run time."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Takes annotations from the classes in `_options`, where they can be read."""
        notes = {
            attribute.name: attribute.annotation.slice.elements
            for options in pkg["_options"].classes.values()
            for attribute in options.attributes.values()
            if "Annotated" in str(attribute.annotation)
        }
        for member in pkg.members.values():
            if not (member.is_function and "options" in member.parameters):
                continue
            function = member.final_target if member.is_alias else member
            if "**options" in function.docstring.value:
                continue
            runtime = getattr(importlib.import_module(pkg.path), function.name)
            del function.parameters["options"]
            for name, parameter in inspect.signature(runtime).parameters.items():
                if name in function.parameters:
                    continue
                annotation, option = notes[name]
                default = parameter.default
                is_plain = isinstance(default, (str, int, float, type(None)))
                function.parameters.add(
                    griffe.Parameter(
                        name,
                        annotation=annotation,
                        kind=griffe.ParameterKind.keyword_only,
                        default=repr(default) if is_plain else option.arguments[0],
                    )
                )


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Lets links to notebooks lead to their pages; docs/notebooks is their folder."""
    return markdown.replace("](../notebooks/", "](notebooks/")


def on_post_page(output: str, **kwargs: object) -> str:
    """Lets links in notebooks lead to pages, as those in pages do."""
    output = output.replace('href="../docs/', 'href="../')
    return re.sub(r'(href="[^":#]*)\.(?:ipynb|md)(?=["#])', r"\1.html", output)


class _Page(html.parser.HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.references = {"", "__top"}, []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.anchors |= {of.get("id"), of.get("name")}
        self.references += [of[key] for key in ("href", "src") if of.get(key)]


def on_post_build(config: dict[str, str], **kwargs: object) -> None:
    """Raises an error for dead links, also in notebooks, and for a poor search."""
    site = Path(config["site_dir"])
    pages = {
        path.relative_to(site).as_posix(): _Page(path.read_text())
        for path in site.rglob("*.html")
        if path.name != "404.html"
    }
    dead = []
    for name, page in pages.items():
        for reference in page.references:
            target, _, anchor = unquote(urljoin(f"/{name}", reference)).partition("#")
            if re.match(r"https?:|mailto:|data:|javascript:", reference):
                continue
            file = target.split("?")[0].removeprefix("/") or "index.html"
            is_there = (site / file).is_file()
            if not is_there or (file in pages and anchor not in pages[file].anchors):
                dead.append(f"{name}: {reference}")
    if dead:
        raise PluginError("dead links in the built site:\n" + "\n".join(dead))
    found = json.dumps(json.loads((site / "search/search_index.json").read_text()))
    if missing := [term for term in TERMS if term not in found.lower()]:
        raise PluginError(f"the search does not find {missing}")
