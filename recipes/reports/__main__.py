"""Writes all tables of all pages again, as the committed results say: python -m recipes.reports"""

from recipes.lab import command
from recipes.reports.pages import write_pages


command.run(write_pages)
