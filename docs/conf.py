"""How Sphinx makes a site of these pages: `launch/docs.sh`."""

project = "vita_jax"
copyright = "the vita_jax authors, Apache-2.0"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "vita_jax"
# Anchors of headings, so that links to them are checked.
myst_heading_anchors = 3
highlight_language = "text"
nitpicky = True
exclude_patterns = ["site"]
