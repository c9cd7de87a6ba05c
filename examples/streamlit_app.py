"""A page for a server of moss-jt, by Streamlit. `moss-jt web --ui streamlit` shows the same page, and serves a model, too.

    moss-jt serve &
    streamlit run examples/streamlit_app.py --server.address 127.0.0.1

From the environment: MOSS_JT_SERVER, the address of the server (http://127.0.0.1:19324), and MOSS_JT_KEY, its key.
"""

from moss_jt.web.streamlit_page import show

show()
