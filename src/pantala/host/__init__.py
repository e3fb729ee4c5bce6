"""Everything about one host: its identity, settings and processes, and how it joins. For boxes and for servers."""
