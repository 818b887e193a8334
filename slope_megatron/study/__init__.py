"""The accuracy study: a list of `slope pretrain` runs, one CSV row a finished run, tables and charts."""
