"""The web pages: two faces of one server, which they ask over HTTP as any other program would.

    client          what a server is asked, and what it tells, as plain values
    words           what the pages say, in both languages
    rendering       texts of people, models and tools, made safe to show
    gradio_page     the main page
    streamlit_page  the other one

Nothing here loads a model. Gradio, Streamlit and httpx come with the extra `web`.
"""
