"""A merge of whole models: vectors and a method become changes, and changes become files."""
