"""The pages of experts: all of them, and one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nicegui import ui

from aios.brains.brain import Brain
from aios.manager import expert_forms
from aios.manager.counts import Overview, needs, read_overview, tree
from aios.manager.frame import Page, Site, begin_here, empty, facts, framed, heading, try_call
from aios.store.experts import ExpertEntry, Registry
from aios.store.goals import Goals

_COLUMNS = [
    ("id", "Expert", ""),
    ("category", "Category", "wide"),
    ("state", "State", ""),
    ("activations", "Activations", "wide"),
    ("weight", "Mean weight", "wide"),
    ("goals", "Goals", "wide"),
    ("parent", "Below", "wide"),
    ("brains", "Attached to", ""),
]
_LINK = (
    """<q-td :props="props"><a :href="'/experts/' + encodeURIComponent(props.row.id)">{{ props.row.id }}</a></q-td>"""
)
_HEADER = """<q-th :props="props" tabindex="0" @keydown.enter="props.sort(props.col)">{{ props.col.label }}</q-th>"""
EVERY = 1.0
"""Seconds between two checks of a file."""


def add_to(site: Site) -> None:
    """Add the pages."""

    @ui.page("/")
    def experts() -> None:
        with framed(site, "Experts", "Experts") as page:
            _Experts(page)

    @ui.page("/experts/{expert_id}")
    def expert(expert_id: str) -> None:
        with framed(site, expert_id, "Experts") as page:
            _Expert(page, expert_id)


def watch(files: Callable[[], Iterable[Path]], changed: Callable[[], Any]) -> None:
    """Call ``changed`` when one of the files is another than it was."""

    def state_of_files() -> list[tuple[int, int, int]]:
        found = []
        for file in files():
            try:
                state = file.stat()
                found.append((state.st_ino, state.st_mtime_ns, state.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found

    seen = [state_of_files()]

    def compare() -> None:
        now = state_of_files()
        if now != seen[0]:
            seen[0] = now
            changed()

    ui.timer(EVERY, compare)


class _Experts:
    """The table and the tree, with counts and a search."""

    def __init__(self, page: Page) -> None:
        self.page, self.site = page, page.site
        self.words, self.view = "", "Table"
        with ui.element("div").classes("spread"):
            heading("Experts")
            with ui.element("div").classes("line"):
                ui.button("New expert", on_click=self._create).props("outline")
                ui.button("Train an expert", on_click=lambda: ui.navigate.to("/jobs#train"))
        self.head = ui.element("div").style("display: contents")
        with ui.element("div").classes("line") as self.tools:
            search = ui.input("Search", on_change=lambda event: self._search(event.value))
            search.props("dense outlined clearable debounce=200 maxlength=200").classes("grow")
            ui.toggle(["Table", "Tree"], value=self.view, on_change=lambda event: self._turn(event.value))
        self.body = ui.element("div").classes("panel")
        self.seen: Any = None
        page.refresh = self.show
        self.show()
        registry = Registry(self.site.root).file
        watch(
            lambda: [registry, *(path for one in self.overview.entries for path in needs(self.site.root, one))],
            self.show,
        )

    def show(self) -> None:
        """Read the registry and show it; the search and what is typed there stay."""
        outcome = try_call(read_overview, self.site.root)
        if outcome == self.seen:
            return  # drawn again, a button just being pressed would be lost
        self.seen = outcome
        self.overview = outcome.value or Overview((), frozenset())
        self.head.clear()
        with self.head:
            if outcome.error:
                ui.label(outcome.error).classes("panel wrong")
            else:
                self._counts(self.overview)
                if not self.overview.entries:
                    self._none()
        for one in (self.tools, self.body):
            one.set_visibility(bool(self.overview.entries))
        self._body()

    def _none(self) -> None:
        words = "No expert yet."
        if not Brain.names(self.site.root):
            begin_here(self.site, words)
            return
        command = self.site.command("experts", "train", "laws", "--brain", "small", "--dataset-file", "my-texts/")
        empty(f"{words} Train one on a text of its own, or enter one to be trained later.", command)

    def _search(self, words: str | None) -> None:
        self._change(words or "", self.view)

    def _turn(self, view: str) -> None:
        self._change(self.words, view)

    def _change(self, words: str, view: str) -> None:
        if (words, view) != (self.words, self.view):  # drawn again, what has the focus would lose it
            self.words, self.view = words, view
            self._body()

    def _counts(self, overview: Overview) -> None:
        meaning = {"orphaned": "their weights, or a brain they are attached to, are gone"}
        with ui.element("div").classes("counts"):
            for name, number in overview.counts.items():
                with ui.element("div").classes("count") as box:
                    ui.label(str(number)).classes("number")
                    ui.label(name).classes("soft")
                if name in meaning:
                    with box:
                        ui.tooltip(meaning[name])

    def _body(self) -> None:
        found = self.overview.found(self.words)
        self.body.clear()
        with self.body:
            if not found:
                ui.label("No expert has these words.").classes("soft")
            elif self.view == "Tree":
                nodes = tree(self.overview.entries, [one.expert_id for one in found] if self.words else None)
                chosen = ui.tree(nodes, label_key="label", on_select=lambda event: _open(event.value))
                chosen.expand()
            else:
                columns = [
                    {"name": name, "label": label, "field": name, "align": "left", "sortable": True,
                     "classes": wide, "headerClasses": wide}
                    for name, label, wide in _COLUMNS
                ]  # fmt: skip
                rows = [self._row(one) for one in found]
                table = ui.table(columns=columns, rows=rows, row_key="id", pagination={"rowsPerPage": 25})
                table.props("flat dense").add_slot("body-cell-id", _LINK)
                table.add_slot("header-cell", _HEADER)
                if len(rows) <= 25:
                    table.props("hide-bottom")

    def _row(self, one: ExpertEntry) -> dict[str, Any]:
        return {
            "id": one.expert_id,
            "category": one.category,
            "state": ", ".join(self.overview.state(one)),
            "activations": one.total_activations,
            "weight": f"{one.avg_routing_weight:.3f}" if one.total_activations else "",
            "goals": len(one.goals) or "",
            "parent": one.parent_expert_id or "",
            "brains": ", ".join(one.attached_to),
        }

    async def _create(self) -> None:
        await expert_forms.create(self.page)


def _open(expert_id: str | None) -> None:
    if expert_id:
        from urllib.parse import quote

        ui.navigate.to(f"/experts/{quote(expert_id, safe='')}")


class _Expert:
    """One expert: what is known of it, and everything that can be done to it."""

    def __init__(self, page: Page, expert_id: str) -> None:
        self.page, self.site, self.id = page, page.site, expert_id
        self.content = ui.element("div").style("display: contents")
        self.seen: Any = None
        self.places: list[Path] = []
        page.refresh = self.show
        self.show()
        registry = Registry(self.site.root)
        watch(lambda: [registry.file, registry.database, *self.places], self.show)

    def show(self) -> None:
        """Read the expert and show it."""
        outcome = try_call(read_overview, self.site.root)
        found = [] if outcome.value is None else [one for one in outcome.value.entries if one.expert_id == self.id]
        self.places = [path for one in found for path in needs(self.site.root, one)]
        goals = try_call(Goals(self.site.root).all, active_only=False)
        now = outcome.error, found, found and outcome.value and outcome.value.state(found[0]), goals
        if now == self.seen:
            return
        self.seen = now
        self.content.clear()
        with self.content:
            if not found or outcome.value is None:
                heading(self.id if outcome.error else "No such expert")
                ui.label(outcome.error or f"There is no expert {self.id!r}; it may have been renamed or deleted.")
                ui.link("All experts", "/")
                return
            one = found[0]
            with ui.element("div").classes("spread"):
                heading(one.expert_id)
                with ui.element("div").classes("line"):
                    for word in outcome.value.state(one):
                        ui.label(word).classes("mark")
            expert_forms.actions(self.page, one)
            with ui.element("div").classes("two"):
                with ui.element("div").classes("panel"):
                    heading("What is known", 2)
                    facts(_facts(self.site, one))
                with ui.element("div").classes("stack"):
                    expert_forms.goals_of(self.page, one)
                    expert_forms.brains_of(self.page, one)
                    _metrics(one)


def _facts(site: Site, one: ExpertEntry) -> dict[str, str]:
    file = site.root / one.checkpoint_path if one.checkpoint_path else None
    size = f"{file.stat().st_size / 1e6:.2f} MB" if file is not None and file.is_file() else ""
    return {
        "Name": one.name,
        "Description": one.description,
        "Category": one.category,
        "Version": str(one.version) if one.version else "not trained yet",
        "Created": one.created_at,
        "Last trained": one.last_trained or "",
        "Trained on": ", ".join(one.training_datasets),
        "Size on disk": size,
        "Below": one.parent_expert_id or "",
        "Above": ", ".join(one.child_expert_ids),
        "Activations": f"{one.total_activations:,}" if one.total_activations else "",
        "Mean weight": f"{one.avg_routing_weight:.3f}" if one.total_activations else "",
        "Base": one.base_fingerprint[:16],
        "Tokenizer": one.tokenizer_fingerprint[:16],
        "Settings": ", ".join(f"{name} {value}" for name, value in one.training_config.items()),
        "Uid": one.expert_uid,
    }


def _metrics(one: ExpertEntry) -> None:
    parts = {name: value for name, value in one.performance_metrics.items() if isinstance(value, dict)}
    if not parts:
        return
    domains = list(dict.fromkeys(domain for value in parts.values() for domain in value))
    columns = [{"name": "domain", "label": "Held-out text", "field": "domain", "align": "left"}] + [
        {"name": name, "label": name.replace("_", " "), "field": name, "align": "right"} for name in parts
    ]
    rows = [
        {"domain": domain} | {name: _number(value.get(domain)) for name, value in parts.items()} for domain in domains
    ]
    with ui.element("div").classes("panel"):
        heading(f"Measured, {one.performance_metrics.get('unit', '')}", 2)
        ui.table(columns=columns, rows=rows, row_key="domain").props("flat dense hide-bottom")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
