-- One job as it stands, and how much of its text is stored. KEYS job. ARGV the names of the fields.
local h = call('HMGET', KEYS[1], 'attempt', 'nonce')
if not h[1] then
  return {}
end
local values = call('HMGET', KEYS[1], unpack(ARGV))
values[#ARGV + 1] = call('STRLEN', KEYS[1] .. ':text:' .. h[1] .. '.' .. h[2])
return values
