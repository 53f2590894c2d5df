"""Sphinx over nbdev's processed notebooks: they were run when they were committed, nothing is run here."""
from configparser import ConfigParser
from pathlib import Path

facts = ConfigParser(delimiters=['='])
facts.read(Path(__file__).parents[1] / 'settings.ini', encoding='utf-8')
facts = facts['DEFAULT']

project = facts['title']
author = facts['author']
copyright = facts['copyright']
version = release = facts['version']

extensions = ['myst_nb', 'sphinx-mathjax-offline']
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'  # tables that a cell prints
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'smartquotes', 'attrs_block']
myst_heading_anchors = 3
exclude_patterns = ['_build']
suppress_warnings = [
    'myst.header',  # the documentation of a function starts at its own level of heading, wherever it stands
    'misc.highlighting_failure',  # a signature as nbdev writes it, with comments, is not always Python
]
html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
nb_ipywidgets_js = {}  # no page has live widgets, so none asks the network for their code
