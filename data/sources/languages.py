"""Which programming language a file is in, by the ending of its name, its whole name, or its first line."""

from __future__ import annotations

import re

ENDINGS = {
    "Ada": ("adb", "ads"),
    "Agda": ("agda",),
    "Assembly": ("asm", "s"),
    "Awk": ("awk",),
    "Batch": ("bat", "cmd"),
    "C": ("c", "h"),
    "C#": ("cs", "csx"),
    "C++": ("cpp", "cc", "cxx", "hpp", "hh", "hxx", "c++", "h++", "ipp", "tpp"),
    "CMake": ("cmake",),
    "CSS": ("css", "scss", "sass", "less"),
    "CUDA": ("cu", "cuh"),
    "Clojure": ("clj", "cljs", "cljc", "edn"),
    "CoffeeScript": ("coffee",),
    "Common Lisp": ("lisp", "lsp", "cl"),
    "Coq": ("v",),
    "Crystal": ("cr",),
    "D": ("d",),
    "Dart": ("dart",),
    "Elixir": ("ex", "exs"),
    "Elm": ("elm",),
    "Emacs Lisp": ("el",),
    "Erlang": ("erl", "hrl"),
    "F#": ("fs", "fsi", "fsx"),
    "Fortran": ("f", "f77", "f90", "f95", "f03", "f08", "for"),
    "GLSL": ("glsl", "vert", "frag"),
    "Go": ("go",),
    "GraphQL": ("graphql", "gql"),
    "Groovy": ("groovy", "gradle"),
    "HCL": ("tf", "hcl"),
    "HTML": ("html", "htm", "xhtml"),
    "Haskell": ("hs", "lhs"),
    "Idris": ("idr",),
    "JSON": ("json", "jsonc"),
    "Java": ("java",),
    "JavaScript": ("js", "jsx", "mjs", "cjs"),
    "Julia": ("jl",),
    "Jupyter Notebook": ("ipynb",),
    "Kotlin": ("kt", "kts"),
    "Lean": ("lean",),
    "Lua": ("lua",),
    "Makefile": ("mk", "mak"),
    "Markdown": ("md", "markdown"),
    "Nim": ("nim",),
    "Nix": ("nix",),
    "OCaml": ("ml", "mli"),
    "Objective-C": ("m", "mm"),
    "PHP": ("php", "phtml"),
    "Pascal": ("pas", "pp", "dpr"),
    "Perl": ("pl", "pm", "t"),
    "PowerShell": ("ps1", "psm1"),
    "Prolog": ("pro", "prolog"),
    "Protocol Buffers": ("proto",),
    "Python": ("py", "pyi", "pyx", "pxd"),
    "R": ("r",),
    "Racket": ("rkt",),
    "Ruby": ("rb", "rake", "gemspec"),
    "Rust": ("rs",),
    "SQL": ("sql",),
    "Scala": ("scala", "sc"),
    "Scheme": ("scm", "ss"),
    "Shell": ("sh", "bash", "zsh", "ksh", "fish"),
    "Solidity": ("sol",),
    "Swift": ("swift",),
    "SystemVerilog": ("sv", "svh"),
    "TOML": ("toml",),
    "Tcl": ("tcl",),
    "TeX": ("tex", "sty", "cls"),
    "Text": ("txt",),
    "TypeScript": ("ts", "tsx", "mts", "cts"),
    "VHDL": ("vhd", "vhdl"),
    "Vue": ("vue",),
    "XML": ("xml", "xsd", "xsl", "xslt"),
    "YAML": ("yaml", "yml"),
    "Zig": ("zig",),
    "reStructuredText": ("rst",),
}
NAMES = {
    "cmakelists.txt": "CMake",
    "dockerfile": "Dockerfile",
    "containerfile": "Dockerfile",
    "gemfile": "Ruby",
    "rakefile": "Ruby",
    "gnumakefile": "Makefile",
    "makefile": "Makefile",
    "jenkinsfile": "Groovy",
    "build.bazel": "Starlark",
    "build": "Starlark",
    "workspace": "Starlark",
}
INTERPRETERS = {
    "python": "Python",
    "sh": "Shell",
    "bash": "Shell",
    "zsh": "Shell",
    "ksh": "Shell",
    "dash": "Shell",
    "perl": "Perl",
    "ruby": "Ruby",
    "node": "JavaScript",
    "php": "PHP",
    "lua": "Lua",
    "rscript": "R",
    "tclsh": "Tcl",
    "awk": "Awk",
    "gawk": "Awk",
}
BY_ENDING = {ending: language for language, endings in ENDINGS.items() for ending in endings}
NOT_CODE = frozenset(
    {"JSON", "XML", "YAML", "TOML", "Text", "Markdown", "reStructuredText", "HTML", "Jupyter Notebook"}
)
LANGUAGES = frozenset(ENDINGS) | frozenset(NAMES.values())
HASHBANG = re.compile(
    rb"#![ \t]{0,8}[^\s]{0,100}/(?:env[ \t]{1,8}(?:-S[ \t]{1,8})?([a-z]{1,16})|([a-z]{1,16}))", re.IGNORECASE
)


def language_of(name: str, head: bytes = b"") -> str | None:
    """The language of a file by its name and, where that says nothing, its first bytes; none if it is not known."""
    base = name.rpartition("/")[2].lower()
    if base in NAMES:
        return NAMES[base]
    stem, dot, ending = base.rpartition(".")
    if dot and stem:
        return BY_ENDING.get(ending)
    called = HASHBANG.match(head)
    if called is None:
        return None
    return INTERPRETERS.get((called[1] or called[2]).decode().lower())
