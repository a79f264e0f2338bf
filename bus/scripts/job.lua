-- One job as it stands, and how much of its text is stored. KEYS job. ARGV the names of the fields.
local fence = call('HGET', KEYS[1], 'fence')
if not fence then
  return {}
end
local values = call('HMGET', KEYS[1], unpack(ARGV))
values[#ARGV + 1] = call('STRLEN', KEYS[1] .. ':text:' .. fence)
return values
