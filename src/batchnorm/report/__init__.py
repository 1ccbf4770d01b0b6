"""Numbers in, text or one HTML file out.

`document` holds what there is to say; `text` says it in a terminal, `charts` and `marks` draw it, `page` makes it one
HTML file.
"""
