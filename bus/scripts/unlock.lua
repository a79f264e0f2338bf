-- Free the lock, by its token only; the token stays for 10 s so that it is not given out twice. KEYS lock. ARGV epoch.
if call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
call('DEL', KEYS[1]) -- so that the SET passes at maxmemory
call('SET', KEYS[1], '-' .. ARGV[1], 'PX', 10000)
return 1
