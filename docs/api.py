"""The reference: public names of every module with signature, docments and docstring, read from the sources without importing them."""
from __future__ import annotations

import ast
import copy
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Module:
    "One file of the library."
    name: str  # irnb.images
    notebook: Path  # that exports it
    tree: ast.Module
    comments: dict[int, str]  # line -> comment at its end
    public: list[str]
    doc: str = ""
    cells: dict[str, str] = field(default_factory=dict)  # public name -> id of the notebook cell that defines it


def read(path: Path, root: Path) -> Module:
    "Parse an exported module."
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    made_from = re.search(r"File to edit: (\S+?)\.?$", source, re.MULTILINE)
    module = Module(name, (path.parent / made_from[1]).resolve(), tree, comments, public, ast.get_docstring(tree) or "")
    marks = [(n, m[1]) for n, line in enumerate(source.splitlines(), 1) if (m := re.match(r"# %% .*ipynb #(\w+)", line))]
    for node in tree.body:
        for defined in names_of(node):
            module.cells[defined] = next((cell for n, cell in reversed(marks) if n < node.lineno), "")
    return module


def modules(root: Path) -> list[Module]:
    "Every exported module, in the order of their names."
    return [read(p, root) for p in sorted((root / "irnb").rglob("*.py")) if "File to edit:" in p.read_text(encoding="utf-8")]


def names_of(node: ast.stmt) -> list[str]:
    "What a top-level statement defines."
    if isinstance(node, (*Function, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    targets = [name for t in targets for name in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def definitions(module: Module) -> dict[str, ast.stmt]:
    "Public name -> its statement, in the order of the file."
    return {name: node for node in module.tree.body for name in names_of(node) if name in module.public}


def members(node: ast.ClassDef) -> list[ast.stmt]:
    "The public methods and properties of a class; a setter belongs to its property."
    setter = lambda m: any(getattr(d, "attr", "") in ("setter", "deleter") for d in m.decorator_list)
    return [m for m in node.body if isinstance(m, Function) and not m.name.startswith("_") and not setter(m)]


def known(every: list[Module]) -> set[str]:
    "All full names that the reference has an anchor for."
    found = {m.name for m in every}
    for module in every:
        for name, node in definitions(module).items():
            found.add(f"{module.name}.{name}")
            if isinstance(node, ast.ClassDef):
                found |= {f"{module.name}.{name}.{m.name}" for m in members(node)}
    return found


def escape(text: str) -> str:
    "Prose of a comment or docstring as Markdown: code spans stay, everything else is literal."
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if p.startswith("`") and p.endswith("`") and len(p) > 1 else re.sub(r"([\\`*_{}\[\]<>$|#])", r"\\\1", p) for p in parts)


def docstring(node: ast.AST) -> str:
    "The docstring as Markdown: paragraphs flow, indented or fenced parts are shown as they stand."
    doc = ast.get_docstring(node) or ""
    blocks = [b for b in re.split(r"\n\s*\n", doc) if b.strip()]
    return "\n\n".join(f"```text\n{b}\n```" if re.match(r" {2,}|```", b) else escape(b) for b in blocks)


def parameters(node: ast.FunctionDef, comments: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "(name, type, default, comment) of each parameter but self."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip((p.arg for p in reversed(plain)), reversed(a.defaults))) | {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    every = [(p, "") for p in plain] + [(a.vararg, "*")] * bool(a.vararg) + [(p, "") for p in a.kwonlyargs] + [(a.kwarg, "**")] * bool(a.kwarg)
    last = {max(p.end_lineno, getattr(defaults.get(p.arg), "end_lineno", 0)): p.arg for p, _ in every}  # the comment belongs to the last of its line
    taken = {node.returns.end_lineno} if node.returns else set()
    rows = []
    for p, stars in every:
        line = max(p.end_lineno, getattr(defaults.get(p.arg), "end_lineno", 0))
        comment = comments.get(line, "") if last[line] == p.arg and line not in taken else ""
        rows.append((stars + p.arg, ast.unparse(p.annotation) if p.annotation else "", ast.unparse(defaults[p.arg]) if p.arg in defaults else "", comment))
    return [r for i, r in enumerate(rows) if not (i == 0 and r[0] in ("self", "cls"))]


def fields(node: ast.ClassDef, comments: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "(name, type, default, comment) of each annotated public field of a dataclass or named tuple."
    return [(f.target.id, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else "", comments.get(f.end_lineno, ""))
            for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name) and not f.target.id.startswith("_")]


def signature(node: ast.FunctionDef, types: bool = False) -> str:
    "Names and defaults; types only where no table has them."
    bare = copy.deepcopy(node.args)
    for p in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg):
        if p is not None and not types:
            p.annotation = None
    if bare.args and bare.args[0].arg in ("self", "cls"):
        bare.args.pop(0)
    return f"({ast.unparse(bare)})" + (f" -> {ast.unparse(node.returns)}" if types and node.returns else "")


def code(text: str) -> str:
    "A code span for a table cell."
    return f"`{text}`".replace("|", r"\|") if text and "`" not in text else escape(text)


def table(rows: list[tuple[str, str, str, str]], returns: tuple[str, str] = ("", "")) -> str:
    "Docments as a table; empty where nothing is said."
    if not any(r[3] for r in rows) and not returns[1]:
        return ""
    lines = [f"| {code(name)}{' = ' + code(default) if default else ''} | {code(kind)} | {escape(comment)} |" for name, kind, default, comment in rows]
    if returns[0] not in ("", "None") or returns[1]:
        lines.append(f"| *returns* | {code(returns[0])} | {escape(returns[1])} |")
    return "\n".join(["| parameter | type | meaning |", "|---|---|---|", *lines]) if lines else ""


def function(node: ast.FunctionDef, comments: dict[int, str], kind: str, fence: str) -> str:
    "One function or method."
    marks = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
    returned = (ast.unparse(node.returns), comments.get(node.returns.end_lineno, "")) if node.returns else ("", "")
    if kind == "method" and marks & {"property", "cached_property"}:
        head = f"{fence}{{py:property}} {node.name}\n" + (f":type: {returned[0]}\n" if returned[0] else "")
        body = [docstring(node), escape(returned[1])]
    else:
        flag = "".join(f":{m}:\n" for m, on in (("classmethod", "classmethod" in marks), ("staticmethod", "staticmethod" in marks)) if on)
        said = table(parameters(node, comments), returned)
        head = f"{fence}{{py:{kind}}} {node.name}{signature(node, types=not said)}\n{flag}"
        body = [docstring(node), said]
    return head + "\n" + "\n\n".join(filter(None, body)) + f"\n{fence}"


def klass(node: ast.ClassDef, comments: dict[int, str]) -> str:
    "One class: its constructor's parameters or its fields, then its public methods."
    init = next((m for m in node.body if isinstance(m, Function) and m.name == "__init__"), None)
    rows = parameters(init, comments) if init else fields(node, comments)
    call = signature(init, types=not table(rows)).removesuffix(" -> None") if init else "(" + ", ".join(n + (f"={d}" if d and not d.startswith("field(") else "") for n, _, d, _ in rows) + ")"
    bases = [ast.unparse(b) for b in node.bases]
    kind = "exception" if any(b.endswith(("Error", "Exception", "Warning")) for b in bases) else "class"
    head = f"`````{{py:{kind}}} {node.name}{call if rows or kind == 'class' else ''}"
    parts = [docstring(node), f"Bases: {', '.join(f'`{b}`' for b in bases)}" if bases else "", table(rows)]
    parts += [function(m, comments, "method", "````") for m in members(node)]
    return head + "\n\n" + "\n\n".join(filter(None, parts)) + "\n`````"


def constant(name: str, node: ast.stmt, comments: dict[int, str]) -> str:
    "One public table or value."
    given, names = node.value, names_of(node)
    given = given.elts[names.index(name)] if len(names) > 1 and isinstance(given, ast.Tuple) else given
    value = ast.unparse(given) if given else ""
    kind = f":type: {ast.unparse(node.annotation)}\n" if isinstance(node, ast.AnnAssign) else ""
    shown = f":value: {value}\n" if 0 < len(value) <= 100 and "\n" not in value else ""
    return f"`````{{py:data}} {name}\n{kind}{shown}\n{escape(comments.get(node.end_lineno, ''))}\n`````"


def page(module: Module, links: dict[str, str]) -> str:
    "The reference page of one module; `links` maps a public name to Markdown that leads to its definition in the notebook."
    parts = [f"# {module.name}", f"```{{py:module}} {module.name}\n```", escape(module.doc)]
    found = definitions(module)
    parts.append(f"Explained and defined in {links['']}." if found else f"Explained in {links['']}; it defines no public names.")
    for name, node in found.items():
        text = (klass(node, module.comments) if isinstance(node, ast.ClassDef) else function(node, module.comments, "function", "`````")
                if isinstance(node, Function) else constant(name, node, module.comments))
        head, _, _ = text.rpartition("\n`````")
        parts.append(f"{head}\n\n{links[name]}\n`````" if name in links else text)
    return "\n\n".join(parts) + "\n"
