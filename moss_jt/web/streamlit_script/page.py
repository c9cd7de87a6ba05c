"""What Streamlit is told to run: a file in a folder of its own, since that folder becomes a place to import from."""

from moss_jt.web.streamlit_page import show

show()
