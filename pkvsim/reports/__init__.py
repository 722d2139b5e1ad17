"""What a study looks like: tables, plots, a web page, a timeline file."""
